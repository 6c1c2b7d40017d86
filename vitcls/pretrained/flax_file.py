"""Flax's weight files: what the Flax classes of transformers wrote before its version 5.

They are trees of arrays in msgpack. `flax.serialization` would decode whatever a file holds, all
of it, into memory. `FlaxFile` reads the names and lengths only, at most `_MOST_ITEMS` of them, and
notes where the arrays lie: no file, however large, costs more than that before the strict loading
has compared its tensors with the network's. What flax does not write into a checkpoint is refused.
"""

import dataclasses
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vitcls.errors import UserError

_COLLECTIONS = ("params", "batch_stats")  # top of the tree, where there is BatchNorm
_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_DTYPES = {t: np.dtype(getattr(jnp, t)) for t in ("float64", "float32", "float16", "bfloat16")}
_NDARRAY = 1  # flax's code of the one msgpack extension that weights need
_CHUNKED = "__msgpack_chunked_array__"  # first key of the map that stands for a large array
_MOST_ITEMS = 1 << 18  # a ResNet-152 has 8 000
_MOST_DEPTH = 32  # a ResNet has 11
# The first byte of an item of msgpack -> its kind and value, which is a number or a length ...
_SHORT = {
    **{byte: ("int", byte) for byte in range(0x80)},
    **{byte: ("map", byte - 0x80) for byte in range(0x80, 0x90)},
    **{byte: ("array", byte - 0x90) for byte in range(0x90, 0xA0)},
    **{byte: ("str", byte - 0xA0) for byte in range(0xA0, 0xC0)},
    **{0xD4 + power: ("ext", 1 << power) for power in range(5)},
    0xC3: ("bool", 1),
}
# ... or its kind and how many bytes the value takes that follows.
_LONG = {
    **{0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4)},
    **{0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4)},
    **{0xCC: ("int", 1), 0xCD: ("int", 2), 0xCE: ("int", 4)},
    **{0xD9: ("str", 1), 0xDE: ("map", 2)},
}


class FlaxFile:
    """Its tensors by the names and in the shapes that torch has; data is read when asked for."""

    def __init__(self, path: Path):
        """Opens `path`. Raises `UserError` if it is damaged, or no tree of floats."""
        self._arrays = {}
        try:
            with path.open("rb") as file:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = _Reader(self._content)
            for names, array in _arrays(reader):
                name = _torch_name(names)
                if name in self._arrays:
                    raise _Damaged(f"two tensors {name!r}")
                self._arrays[name] = array
            if reader.position != len(self._content):
                raise _Damaged("bytes after the last tensor")
        except (_Damaged, OSError, ValueError) as error:  # ValueError: mmap, of an empty file
            raise UserError(
                f"{path} is damaged, or not what flax writes ({error}); get it again."
            ) from error

    def names(self) -> set[str]:
        return set(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._arrays[name].shape
        return tuple(shape[axis] for axis in _torch_axes(name, len(shape)))

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, whatever floating-point type it is stored in."""
        array = self._arrays[name]
        stored = [np.frombuffer(self._content, *piece) for piece in array.pieces]
        tensor = np.concatenate([piece.astype(np.float32, copy=False) for piece in stored])
        return tensor.reshape(array.shape).transpose(_torch_axes(name, len(array.shape)))


def _torch_name(names: tuple[str, ...]) -> str:
    """What torch calls the array that flax has under these names of modules."""
    if names[0] in _COLLECTIONS and len(names) > 1:
        names = names[1:]
    # A list's modules without names of their own, as in ResNet's basic layers, are layer_0, ...
    modules = [re.sub(r"^layer_(\d+)$", r"\1", name) for name in names[:-1]]
    return ".".join([*modules, _TORCH_NAMES.get(names[-1], names[-1])])


def _torch_axes(name: str, ndim: int) -> tuple[int, ...]:
    """Flax's axes in torch's order: kernels (in, out) and (height, width, in, out) change."""
    if not name.endswith(".weight") or ndim < 2:
        return tuple(range(ndim))
    return (ndim - 1, ndim - 2, *range(ndim - 2))


@dataclasses.dataclass(frozen=True)
class _Array:
    """Where an array lies in the file: in one piece, unless it is above 1 GB."""

    shape: tuple[int, ...]
    pieces: list[tuple[np.dtype, int, int]]  # type, number of values, position of the first


class _Damaged(Exception):
    """Something that flax does not write into a checkpoint; the message says what."""


class _Reader:
    """Reads one item of msgpack after the other."""

    def __init__(self, content: mmap.mmap):
        self.position = 0
        self._content = content
        self._num_items = 0

    def skip(self, num_bytes: int) -> int:
        """Goes on by `num_bytes`; returns where they begin."""
        start, self.position = self.position, self.position + num_bytes
        if self.position > len(self._content):
            raise _Damaged("it ends too early")
        return start

    def take(self, num_bytes: int) -> bytes:
        start = self.skip(num_bytes)
        return self._content[start : self.position]

    def item(self, *kinds: str) -> tuple[str, int]:
        """Kind and value of the next item, which must be one of `kinds`."""
        start = self.position
        self._num_items += 1
        first = self.take(1)[0]
        kind, value = _SHORT.get(first, (None, 0))
        if first in _LONG:
            kind, width = _LONG[first]
            value = int.from_bytes(self.take(width))
        if kind not in kinds or self._num_items > _MOST_ITEMS:
            raise _Damaged(f"unexpected item {self._num_items} at byte {start}")
        return kind, value

    def value(self, kind: str) -> int:
        return self.item(kind)[1]

    def text(self) -> str:
        return self.take(self.value("str")).decode(errors="replace")


def _arrays(
    reader: _Reader, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], _Array]]:
    """Yields every array of the tree that comes next, with its names from the top down."""
    kind, size = reader.item("map", "ext") if names else reader.item("map")
    if kind == "ext":
        yield names, _array(reader, size)
        return
    if len(names) == _MOST_DEPTH:
        raise _Damaged(f"maps more than {_MOST_DEPTH} deep")
    for index in range(size):
        name = reader.text()
        if name == _CHUNKED and index == 0 and names:
            yield names, _chunked(reader)
            return
        yield from _arrays(reader, (*names, name))


def _array(reader: _Reader, size: int) -> _Array:
    """The array in the `size` bytes after the next: (shape, name of the type, content)."""
    code = reader.take(1)[0]
    end = reader.position + size
    if code != _NDARRAY or reader.value("array") != 3:
        raise _Damaged(f"something other than arrays, at byte {reader.position}")
    shape = tuple(reader.value("int") for _ in range(reader.value("array")))
    dtype_name = reader.text()
    if dtype_name not in _DTYPES:
        raise _Damaged(f"an array of type {dtype_name!r}; weights are {', '.join(_DTYPES)}")
    dtype = _DTYPES[dtype_name]
    num_bytes = reader.value("bin")
    start = reader.skip(num_bytes)
    count = math.prod(shape)
    if num_bytes != count * dtype.itemsize or reader.position != end:
        raise _Damaged(f"an array {shape} of {dtype} in {num_bytes} bytes")
    return _Array(shape, [(dtype, count, start)])


def _chunked(reader: _Reader) -> _Array:
    """The array that flax has cut into pieces, after the key that says so: True, shape, chunks."""
    reader.item("bool")
    shape = tuple(reader.value("int") for _ in _entries(reader))
    chunks = [_array(reader, reader.value("ext")) for _ in _entries(reader)]
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise _Damaged("an array in pieces that do not fit its shape")
    return _Array(shape, [piece for chunk in chunks for piece in chunk.pieces])


def _entries(reader: _Reader) -> Iterator[None]:
    """Goes through a named list, which flax writes as a map from "0", "1", and so on."""
    reader.text()
    for _ in range(reader.value("map")):
        reader.text()
        yield
