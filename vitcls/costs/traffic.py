"""Bytes that a program compiled for a TPU moves between chip and memory, read from its text.

The compiler's own "bytes accessed" also counts what stays in the chip's fast memory (VMEM, 128 MiB
on v5e). The text gives each array's location and its tiles; the rest of a tile is padding.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from vitcls.costs import hlo
from vitcls.costs.hlo import Computations, Instruction

# dtype[sizes]{order of the dimensions, the innermost first:T(tile)...S(memory space)}
_ARRAY = re.compile(r"\b([a-z]+[0-9][a-z0-9]*|pred)\[([\d,]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r":T\(([\d,]+)\)")
_SPACE = re.compile(r"S\([1-9]\d*\)")  # without it, or 0: the memory
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
# Instructions that move nothing themselves.
_FREE = {
    "parameter", "constant", "bitcast", "get-tuple-element", "tuple", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id",
}  # fmt: skip
_CONTROL = {"while", "conditional", "call"}  # the others' computations are parts of themselves
_FREE_CALLS = ('custom_call_target="ConcatBitcast"', 'custom_call_target="AllocateBuffer"')
_SLICES = {"slice", "dynamic-slice"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one instruction moves.

    Attributes:
      name: JAX's name of the operation it computes.
      opcode: HLO's.
      read: Bytes read from the memory in one execution.
      written: Bytes written to it.
      padding: Bytes of padding among both.
      times: Number of executions.
    """

    name: str
    opcode: str
    read: int
    written: int
    padding: int
    times: int


@dataclasses.dataclass(frozen=True)
class _Bytes:
    padded: int = 0
    padding: int = 0

    def __add__(self, other: "_Bytes") -> "_Bytes":
        return _Bytes(self.padded + other.padded, self.padding + other.padding)


def is_tiled(text: str) -> bool:
    """Whether a program gives the tiles of its arrays, as those for TPUs do."""
    return bool(_TILE.search(text))


def find_traffic(text: str, *, num_passes: int = 1) -> list[Traffic]:
    """Returns the traffic of each instruction that moves anything.

    If an instruction reads or writes only a slice of an array, the slice counts.

    Args:
      text: Text of the compiled program.
      num_passes: Rounds of loops without a count in the text.
    """
    computations, entry = hlo.read_computations(text)
    times = hlo.executions(computations, entry, num_passes)
    parts = {
        name
        for instructions in computations.values()
        for one in instructions
        if one.opcode not in _CONTROL
        for name in one.called()
    }
    found = []
    for name in times.keys() - parts:
        shapes = {one.name: one.shapes for one in computations.get(name, ())}
        for one in computations.get(name, ()):
            read, written = _moved(one, shapes, computations)
            if read.padded or written.padded:
                op_name = _OP_NAME.search(one.rest)
                found.append(
                    Traffic(
                        op_name[1] if op_name else "",
                        one.opcode,
                        read.padded,
                        written.padded,
                        read.padding + written.padding,
                        times[name],
                    )
                )
    return found


def repeated_flops(text: str, *, num_passes: int = 1) -> int:
    """Returns the operations of products in loops that the compiler's count leaves out.

    It counts a loop's body once. The caller accounts for loops over `num_passes`.
    """
    computations, entry = hlo.read_computations(text)
    times = hlo.executions(computations, entry, num_passes)
    flops = 0
    for name, count in times.items():
        shapes = {one.name: one.shapes for one in computations.get(name, ())}
        for one in computations.get(name, ()):
            if count > num_passes and one.opcode == "convolution":  # as TPUs multiply matrices
                contracted = _LABELS.search(one.rest)[1].index("i")
                kernel = _sizes(shapes[one.operands()[1]])[contracted]
                flops += 2 * math.prod(_sizes(one.shapes)) * kernel * (count - num_passes)
    return flops


def _moved(
    one: Instruction, shapes: dict[str, str], computations: Computations
) -> tuple[_Bytes, _Bytes]:
    """Bytes that an instruction reads and writes."""
    none = _Bytes()
    if one.opcode in _FREE or any(target in one.rest for target in _FREE_CALLS):
        return none, none
    operands = list(dict.fromkeys(one.operands()))
    result = _in_memory(one.shapes)
    if one.opcode.endswith(("-done", "-update")):  # -start has read
        return none, result
    if one.opcode == "slice-start":  # ((operand), result, context)
        taken = _bytes(list(_ARRAY.finditer(one.shapes))[1:2])
        return (taken if _in_memory(shapes[operands[0]]).padded else none), none
    whole = sum((_in_memory(shapes[name]) for name in operands), none)
    if one.opcode.endswith("-start"):
        return whole, none
    if one.opcode in _SLICES:
        return (_bytes(_ARRAY.finditer(one.shapes)) if whole.padded else none), result
    if one.opcode == "dynamic-update-slice":
        update = _bytes(_ARRAY.finditer(shapes[operands[1]]))
        return _in_memory(shapes[operands[1]]), update if result.padded else none
    if one.opcode != "fusion":
        return whole, result
    body = computations[one.called()[0]]
    read = none
    for name in operands:
        available = _in_memory(shapes[name])
        if available.padded:
            index = one.operands().index(name)
            read += min(
                available, _taken(body, _parameter(body, index), available, computations),
                key=lambda part: part.padded,
            )  # fmt: skip
    return read, _stored(one.shapes, body, computations)


def _parameter(body: list[Instruction], index: int) -> str:
    rest = f"{index})"
    return next(one.name for one in body if one.opcode == "parameter" and one.rest.startswith(rest))


def _taken(body: list[Instruction], name: str, whole: _Bytes, computations: Computations) -> _Bytes:
    """The part of an array that the instructions of a fusion read."""
    taken = _Bytes()
    for one in body:
        operands = one.operands()
        if name not in operands:
            continue
        if one.opcode in _SLICES and operands[0] == name:
            taken += _bytes(_ARRAY.finditer(one.shapes))
        elif one.opcode == "bitcast" and not one.is_root:
            taken += _taken(body, one.name, whole, computations)
        elif one.opcode == "fusion":
            inner = computations[one.called()[0]]
            inside = _parameter(inner, operands.index(name))
            taken += _taken(inner, inside, whole, computations)
        elif one.opcode != "dynamic-update-slice" or operands[0] != name:
            return whole
    return taken


def _stored(shapes: str, body: list[Instruction], computations: Computations) -> _Bytes:
    """Bytes that a fusion writes: only the update, if it updates an array in place."""
    by_name = {one.name: one for one in body}
    root = next(one for one in body if one.is_root)
    results = [by_name[name] for name in root.operands()] if root.opcode == "tuple" else [root]
    arrays = list(_ARRAY.finditer(shapes))
    if len(arrays) != len(results):  # the result of an exchange between devices, itself a tuple
        return _in_memory(shapes)
    stored = _Bytes()
    for array, result in zip(arrays, results, strict=True):
        while result.opcode in ("bitcast", "copy"):
            result = by_name[result.operands()[0]]
        if result.opcode == "dynamic-update-slice" and not _is_near(array):
            update = by_name[result.operands()[1]]
            stored += _bytes(_ARRAY.finditer(update.shapes))
        else:
            stored += _bytes([] if _is_near(array) else [array])
    return stored


def _in_memory(shapes: str) -> _Bytes:
    """Bytes of the arrays that are not in the fast memory."""
    return _bytes(array for array in _ARRAY.finditer(shapes) if not _is_near(array))


def _is_near(array: re.Match) -> bool:
    return bool(_SPACE.search(array[3] or ""))


def _bytes(arrays: Iterator[re.Match] | list[re.Match]) -> _Bytes:
    return sum(map(_array_bytes, arrays), _Bytes())


def _array_bytes(array: re.Match) -> _Bytes:
    """Bytes of an array in its tiles, and how much of them is padding."""
    dtype, sizes, layout = array[1], _sizes(array[0]), array[3] or ""
    order = [int(dim) for dim in re.findall(r"\d+", layout.partition(":")[0])]
    lying = [sizes[dim] for dim in reversed(order)] if len(order) == len(sizes) else list(sizes)
    tile = _TILE.search(layout)
    tile = [int(size) for size in tile[1].split(",")] if tile else []
    lying = [1] * (len(tile) - len(lying)) + lying
    for dim, size in enumerate(reversed(tile), start=1):
        lying[-dim] = math.ceil(lying[-dim] / size) * size
    itemsize = hlo.itemsize(dtype)
    padded = math.ceil(math.prod(lying) * itemsize)
    return _Bytes(padded, padded - math.ceil(math.prod(sizes) * itemsize))


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in _ARRAY.search(shape)[2].split(",") if size]
