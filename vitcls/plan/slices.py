"""Devices to plan for: those of this machine, or a slice of TPUs that need not exist."""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vitcls.costs import chips, footprint
from vitcls.costs.chips import Chip
from vitcls.processes.devices import start_devices
from vitcls.step import sharding

# A TPU's compiler places everything itself, so that fragments take little of the memory.
_TPU_SHARE = 0.95

# Sizes of the product and of the copy that measure a device which no table knows.
_MATMUL_SIZE, _COPY_SIZE = 2048, 2**26


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to plan for.

    Attributes:
      topology: As the flag names them.
      devices: All of them, of all hosts.
      chip: What each of them can do.
      usable: Bytes of memory that a step may need on each.
    """

    topology: str
    devices: list[jax.Device]
    chip: Chip
    usable: float

    @property
    def num_hosts(self) -> int:
        """Number of machines, each of which loads its part of a batch."""
        return len({device.process_index for device in self.devices})


def open_slice(topology: str, *, dtype: str) -> Slice:
    """Returns the devices that a topology such as "v5e:4x4", or "local", stands for.

    Args:
      topology: See `chips.open_topology`, for which the environment must be prepared.
      dtype: Type of the computation, for devices that have to be measured.
    """
    if topology == "local":
        devices = start_devices()
        mesh = sharding.make_mesh(-1, 1, devices=devices)
        chip = chips.find_chip(devices[0].device_kind) or measure_chip(devices, dtype=dtype)
        usable = footprint.usable_bytes(mesh)
        return Slice(topology, devices, chip, usable)
    chip, _ = chips.parse_topology(topology)
    return Slice(topology, chips.open_topology(topology), chip, _TPU_SHARE * chip.memory)


def measure_chip(devices: list[jax.Device], *, dtype: str) -> Chip:
    """Measures the rates of a device that no table knows, such as a processor.

    Simulated devices of one processor share the rate that the first one reaches alone.
    """
    x = jax.random.normal(jax.random.key(0), (_MATMUL_SIZE,) * 2).astype(dtype)
    share = len(devices) if devices[0].platform == "cpu" else 1
    flops = 2 * _MATMUL_SIZE**3 / _best_secs(jax.jit(jnp.matmul), x, x) / share
    copied = jnp.ones(_COPY_SIZE, jnp.float32)
    bandwidth = 2 * copied.nbytes / _best_secs(jax.jit(jnp.negative), copied) / share
    return Chip(
        name=devices[0].device_kind,
        kind=devices[0].device_kind,
        flops=flops,
        float32_flops=flops,
        memory=math.inf,
        memory_bandwidth=bandwidth,
        link_bandwidth=bandwidth,
    )


def _best_secs(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    # The first call compiles.
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
