"""The exchanges between devices in a compiled program, read from its text.

The text is XLA's HLO after partitioning: shapes are those on one device.
"""

import math
import re
from typing import Any

from vitcls.costs import hlo

_KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b([a-z]+[0-9][a-z0-9]*|pred)\[([0-9,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_TILED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")


def find_collectives(text: str, *, num_devices: int, num_passes: int) -> list[dict[str, Any]]:
    """Returns the exchanges of one execution, equal ones added up, largest first.

    Args:
      text: Text of the compiled program.
      num_devices: Devices that run it.
      num_passes: Rounds of loops without a count in the text.

    Returns:
      For each: `kind`; `dtype`; `devices`, how many take part together; `elements` and `bytes`, of
      the whole array, before it is scattered or after it is gathered, in one execution; and
      `times`, how often it is executed.
    """
    computations, entry = hlo.read_computations(text)
    times = hlo.executions(computations, entry, num_passes)
    sums: dict[tuple[Any, ...], int] = {}
    channels = set()
    for name, instructions in computations.items():
        for _, _, shapes, opcode, rest in instructions:
            kind = opcode.removesuffix("-start")
            if kind not in _KINDS or not times.get(name):
                continue
            channel = _CHANNEL.search(rest)
            if channel and channel[1] in channels:  # TPUs spread one exchange over several fusions
                continue
            channels.add(channel and channel[1])
            devices = _group_size(rest, num_devices)
            arrays = _arrays(shapes, kind, is_start=kind != opcode)
            whole = devices if kind == "reduce-scatter" else 1
            if name.startswith("all-reduce-scatter"):  # its name on TPUs
                kind = "reduce-scatter"
            for dtype, elements in arrays:
                elements *= whole
                key = (kind, dtype, devices, times[name])
                sums[key] = sums.get(key, 0) + elements
    found = [
        {
            "kind": kind,
            "dtype": dtype,
            "devices": devices,
            "elements": elements,
            "bytes": elements * hlo.itemsize(dtype),
            "times": count,
        }
        for (kind, dtype, devices, count), elements in sums.items()
        if devices > 1
    ]
    return sorted(found, key=lambda one: -one["bytes"] * one["times"])


def _arrays(shapes: str, kind: str, *, is_start: bool) -> list[tuple[str, int]]:
    """(dtype, number of elements) of an instruction's results."""
    found = [
        (dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(shapes)
    ]
    if is_start and kind == "collective-permute":  # operand, result, and where it stands
        return found[1:2]
    if is_start and kind != "all-reduce":  # operands, then results
        return found[len(found) // 2 :]
    return found


def _group_size(rest: str, num_devices: int) -> int:
    if listed := _LISTED.search(rest):
        return len(listed[1].split(","))
    if tiled := _TILED.search(rest):
        return int(tiled[1])
    if named := _NAMED.search(rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", named[2]))
    return num_devices
