"""Accelerators: their peak rates and memory, and the TPU slices made of them."""

import dataclasses
import os
import re
import resource
import sys
from typing import Any

from vitcls.errors import UserError, unknown

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; a TPU7x chip is two devices.

    Attributes:
      name: As in a topology; a GPU's is for readers only.
      kind: Beginning of its `device_kind`.
      flops: bfloat16 operations per second; a multiply-add is two.
      float32_flops: The same for float32 arrays at JAX's default precision.
      memory: Bytes that programs can use.
      memory_bandwidth: Bytes per second.
      link_bandwidth: Bytes per second that it sends, and as many that it receives, on all links.
      num_axes: Dimensions of the torus that its links make; 0: a switch.
      ring: Number of chips from which an axis of a slice is a ring; below it is a line.
    """

    name: str
    kind: str
    flops: float
    float32_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    num_axes: int = 0
    ring: int = 0


# TPUs multiply float32 as bfloat16 by default. Rates: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e,
# tpu7x, read in November 2026 ("bidirectional ICI bandwidth" is both directions: halved here); v4:
# docs.cloud.google.com/tpu/docs/v4, and six links of 50 GB/s from Jouppi et al. 2023,
# arXiv:2304.01433. Memory: what the compiler of libtpu 0.0.42.1 has for programs, a little less
# than there is. NVIDIA: data sheets of A100, H100 and H200 (SXM), dense; float32 as TF32.
CHIPS = (
    Chip("v4", "TPU v4", 275e12, 275e12, 30.75 * _GIB, 1.2e12, 300e9, num_axes=3, ring=4),
    Chip("v5e", "TPU v5 lite", 197e12, 197e12, 15.75 * _GIB, 819e9, 200e9, num_axes=2, ring=16),
    Chip("v5p", "TPU v5", 459e12, 459e12, 95.74 * _GIB, 2.765e12, 600e9, num_axes=3, ring=4),
    Chip("v6e", "TPU v6 lite", 918e12, 918e12, 31.25 * _GIB, 1.638e12, 400e9, num_axes=2, ring=16),
    Chip("tpu7x", "TPU7x", 1153.5e12, 1153.5e12, 94.75 * _GIB, 3.69e12, 300e9, num_axes=3, ring=4),
    Chip("A100", "NVIDIA A100-SXM4-80GB", 312e12, 156e12, 80e9, 2.039e12, 300e9),
    Chip("H100", "NVIDIA H100 80GB HBM3", 989e12, 494e12, 80e9, 3.35e12, 450e9),
    Chip("H200", "NVIDIA H200", 989e12, 494e12, 141e9, 4.8e12, 450e9),
)
_TPUS = {chip.name: chip for chip in CHIPS if chip.num_axes}
# Options of libtpu for chips whose two cores work as one device.
_MEGACORE: dict[str, Any] = dict(chip_config_name="megacore", num_slices=1, wrap=(False,) * 3)
_HOST_SIDES = (2, 2, 1)  # chips of one host


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip with JAX's name of a device, or None."""
    found = [chip for chip in CHIPS if device_kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)


def parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the sides of a slice such as "v5e:4x4"; raises `UserError`."""
    name, _, sides = topology.partition(":")
    if name not in _TPUS:
        raise unknown("chip of --topology", name, ["local", *_TPUS])
    chip = _TPUS[name]
    example = "x".join(["4"] * chip.num_axes)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides) or sides.count("x") + 1 != chip.num_axes:
        raise UserError(
            f"--topology={topology} must give the {chip.num_axes} sides of a slice of {name}: "
            f"{name}:{example}, for example."
        )
    return chip, tuple(int(side) for side in sides.split("x"))


def open_topology(topology: str) -> list[Any]:
    """Returns the devices of a TPU slice that need not exist: programs can be compiled for them.

    Before jax is imported, `prepare_environment` must have been called.

    Raises:
      UserError: the slice does not exist, or the compiler for it is not installed.
    """
    from jax.experimental import topologies

    chip, sides = parse_topology(topology)
    options = _MEGACORE if chip.name in ("v4", "v5p") else {}
    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu",
                topology_name=topology,
                chips_per_host_bounds=tuple(map(min, (*sides, 1)[:3], _HOST_SIDES)),
                **options,
            ).devices
        )
    except Exception as error:  # of many types, as libtpu is missing, old or refuses the sides
        if "INVALID_ARGUMENT" in str(error):
            reason = str(error).partition("INVALID_ARGUMENT: ")[2]
            raise UserError(f"--topology={topology} is not a slice: {reason}") from error
        raise UserError(
            f"--topology={topology} needs libtpu, the compiler for TPUs, which runs on any Linux "
            f"machine with an x86-64 processor: pip install 'jax[tpu]' ({error})"
        ) from error


def prepare_environment() -> None:
    """Has libtpu compile without a TPU, and without a search for one; before jax is imported.

    Restarts the command with the largest stack allowed, if it has less.
    """
    _enlarge_stack()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # These do not describe the slice to compile for; they only keep libtpu from complaining.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _enlarge_stack() -> None:
    """See `prepare_environment`.

    libtpu recurses along a network, in ResNet-50 too deeply for the usual 8 MB, and then dies of a
    segmentation fault. The stack of a running process cannot grow beyond its first limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
        os.execv(sys.executable, sys.orig_argv)


def exchange_secs(chip: Chip, sides: tuple[int, ...], collectives: list[dict[str, Any]]) -> float:
    """Returns the least seconds that exchanges take, with all links busy.

    A ring of n devices sends and receives (n - 1) / n of an array once to gather or to scatter it,
    and twice to sum it: Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002.

    Args:
      chip: The devices.
      sides: Sides of the slice; empty for a switch.
      collectives: As `collectives.find_collectives` returns them.
    """
    bandwidth = chip.link_bandwidth
    if chip.num_axes:  # of an axis' two links, a line can use one in each direction
        links = sum(0 if side == 1 else 2 if side % chip.ring == 0 else 1 for side in sides)
        bandwidth *= max(links, 1) / (2 * chip.num_axes)
    moved = sum(
        one["bytes"] * one["times"] * (2 if one["kind"] == "all-reduce" else 1)
        * (one["devices"] - 1) / one["devices"]
        for one in collectives
    )  # fmt: skip
    return moved / bandwidth if moved else 0.0


def step_figures(
    analysis: dict[str, Any], chip: Chip, sides: tuple[int, ...], *, dtype: str
) -> dict[str, float]:
    """Returns lower bounds of a step's time: the roofline of Williams et al. 2009.

    Returns:
      `flops`, `bytes_accessed` and `bytes_exchanged` of one device; the seconds that each takes at
      the chip's rates; `at_best_secs`, if they overlap perfectly; and `at_worst_secs`, their sum,
      if they do not at all.
    """
    flops = chip.flops if dtype == "bfloat16" else chip.float32_flops
    seconds = {
        "compute_secs": analysis["flops"] / flops,
        "memory_secs": analysis["bytes_accessed"] / chip.memory_bandwidth,
        "exchange_secs": exchange_secs(chip, sides, analysis["collectives"]),
    }
    return {
        "flops": analysis["flops"],
        "bytes_accessed": analysis["bytes_accessed"],
        "bytes_exchanged": sum(one["bytes"] * one["times"] for one in analysis["collectives"]),
        **seconds,
        "at_best_secs": max(seconds.values()),
        "at_worst_secs": sum(seconds.values()),
    }


def sides(devices: list[Any]) -> tuple[int, ...]:
    """Returns the sides of the slice that TPU devices make, in chips; () for other devices."""
    places = [getattr(device, "coords", ()) for device in devices]
    return tuple(1 + max(axis) - min(axis) for axis in zip(*places, strict=True))
