"""Where arrays live: one mesh of two axes, `data` and `fsdp`.

Batches are split over both axes. Parameters, and arrays of their shape, are replicated over `data`
and split over `fsdp` along one dimension.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vitcls.errors import UserError

# Smaller arrays are replicated: gathering them would cost more than splitting saves.
MIN_SHARDED_SIZE = 2**16


def make_mesh(data: int, fsdp: int, *, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over all devices.

    Args:
      data: Size of the data axis; -1: all devices that `fsdp` leaves.
      fsdp: Size of the axis over which large parameters are split.
      devices: The devices to use; default all, which `processes.devices` starts.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and len(devices) % fsdp == 0:
        data = len(devices) // fsdp
    if data * fsdp != len(devices):
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not make {len(devices)} devices; "
            "set mesh.data=-1 and mesh.fsdp to a divisor of the number of devices."
        )
    # Devices are sorted by process, not by topology: a process loads neighbouring rows of a batch.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.asarray(devices).reshape(data, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first dimension over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array (or shape) of `tree`.

    Large arrays are split over `fsdp` along their largest divisible dimension.
    """
    # The rule sees shapes only, so an optimizer's moments are placed like their parameters.
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _partition_spec(leaf, mesh)), tree)


def _partition_spec(leaf: Any, mesh: Mesh) -> PartitionSpec:
    fsdp = mesh.shape["fsdp"]
    divisible = [dim for dim, size in enumerate(leaf.shape) if size % fsdp == 0]
    if fsdp == 1 or not divisible or leaf.size < MIN_SHARDED_SIZE:
        return PartitionSpec()
    largest = max(divisible, key=lambda dim: leaf.shape[dim])
    return PartitionSpec(*(("fsdp" if dim == largest else None) for dim in range(leaf.ndim)))


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns shapes that say where their arrays lie."""
    return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), shapes, shardings)


def put(tree: Any, shardings: Any) -> Any:
    """Places host arrays, whole and the same in every process, on the devices of all processes."""

    def place(array: np.ndarray, where: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, where, lambda part: array[part])

    return jax.tree.map(place, tree, shardings)


def on_each_device(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Makes every device call a function of batches with its own rows; no row travels."""
    rows = PartitionSpec(("data", "fsdp"))
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes each process' local part `(b, ...)` of a batch the global `(B, ...)` on the devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def prefetch(
    batches: Iterator[dict[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Makes batches global, one ahead."""
    # The copy of the next batch to the devices thus overlaps a step.
    ahead = None
    for batch in batches:
        batch = to_global(batch, mesh)
        if ahead is not None:
            yield ahead
        ahead = batch
    if ahead is not None:
        yield ahead
