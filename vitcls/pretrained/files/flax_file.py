"""Flax's weight files: what the Flax classes of transformers wrote before its version 5.

They are trees of float arrays in msgpack; all else that `flax.serialization` would restore is
refused. msgpack checks lengths against the bytes there are: the limits are for many small objects.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import msgpack
import numpy as np
from flax.traverse_util import flatten_dict

from vitcls.errors import UserError

_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
_TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_CHUNKED = "__msgpack_chunked_array__"  # key in the map that stands for an array above 1 GB
# Limits of the tree (256: as many layers as a config may ask for), and of an array in it (8 axes).
_TREE = dict(max_map_len=256, max_array_len=0, max_str_len=32)
_ITEM = dict(max_map_len=0, max_array_len=8)
_MAX_ENTRIES, _MAX_DEPTH = 1 << 14, 32  # of the whole tree; a ResNet-152 has 2 000 and 11


class FlaxWeights:
    """`formats.Weights` of flax's file, named and shaped as torch has them; all in memory."""

    def __init__(self, path: Path):
        """Reads `path`. Raises `UserError` if it is damaged, or no tree of floats."""
        content = path.read_bytes()
        try:
            tree = msgpack.unpackb(
                content, ext_hook=_array, object_hook=_at_most(_MAX_ENTRIES), **_TREE
            )
            arrays = flatten_dict(tree, is_leaf=lambda _, node: _CHUNKED in node)
            self._tensors = dict(_tensor(names, leaf) for names, leaf in arrays.items())
            if len(self._tensors) < len(arrays):
                raise ValueError("two arrays of one name")
        except Exception as error:  # msgpack raises many types, and says so
            raise UserError(
                f"{path} is damaged, or not what flax writes ({error}); get it again."
            ) from error

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, from any floating-point type."""
        return self._tensors[name].astype(np.float32)


def _at_most(count: int) -> Callable[[dict | list], dict | list]:
    """A hook for msgpack that leaves maps or lists as they are, up to `count` entries in all."""

    def hook(items: dict | list) -> dict | list:
        nonlocal count
        count -= len(items)
        if count < 0:
            raise ValueError("too many entries")
        return items

    return hook


def _array(code: int, content: bytes) -> np.ndarray:
    """The array in an extension, whose code is 1: (shape, name of the type, values)."""
    shape, dtype, values = msgpack.unpackb(content, list_hook=_at_most(3 + 8), **_ITEM)
    if code != 1 or dtype not in _FLOATS:
        raise ValueError(f"{dtype!r} in extension {code}; weights are {', '.join(_FLOATS)} arrays")
    return np.frombuffer(values, _FLOATS[dtype]).reshape(shape)


def _tensor(names: tuple[str, ...], leaf: np.ndarray | dict) -> tuple[str, np.ndarray]:
    """Name and value that torch has for what flax has under these names of modules."""
    if isinstance(leaf, dict):  # in pieces; flax has maps from "0", "1", ... for lists
        shape, chunks = (list(leaf[key].values()) for key in ("shape", "chunks"))
        leaf = np.concatenate(chunks).reshape(shape)
    if not isinstance(leaf, np.ndarray) or len(names) > _MAX_DEPTH:
        raise ValueError(f"something other than arrays, or deeper than {_MAX_DEPTH} maps")
    if names[-1] == "kernel":  # (in, out) or (height, width, in, out): out and in come first
        leaf = np.moveaxis(leaf, (-1, -2), (0, 1))
    if names[0] in ("params", "batch_stats"):  # the top of a tree with BatchNorm
        names = names[1:]
    # A list's modules without names of their own, as in ResNet's basic layers, are layer_0, ...
    modules = [re.sub(r"^layer_(\d+)$", r"\1", name) for name in names[:-1]]
    return ".".join([*modules, _TORCH_NAMES.get(names[-1], names[-1])]), leaf
