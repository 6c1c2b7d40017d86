"""Weight files: safetensors, in one file or sharded over several, or else flax's msgpack."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitcls.errors import UserError
from vitcls.pretrained.flax_file import FlaxFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLAX = "flax_model.msgpack"
# The file that shows each format -> globs of all its files; the first that is there is read alone.
FORMATS = {SINGLE: (SINGLE,), INDEX: (INDEX, "model-*.safetensors"), FLAX: (FLAX,)}
_FLOATS = ("F64", "F32", "F16", "BF16")


class Weights:
    """The tensors of a checkpoint by their names; headers are read at once, data when asked for."""

    def __init__(self, directory: Path):
        """Opens the files in `directory`. Raises `UserError` if one is missing or damaged."""
        shown = next((name for name in FORMATS if (directory / name).exists()), INDEX)
        first = directory / shown
        self._file_of = {}  # tensor name -> open file
        for path in _shards(first) if shown == INDEX else [first]:
            file = FlaxFile(path) if shown == FLAX else _SafetensorsFile(path)
            self._file_of |= dict.fromkeys(file.names(), file)

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, whatever floating-point type it is stored in."""
        return self._file_of[name].read(name)


class _SafetensorsFile:
    """One file, as `FlaxFile` is one of flax's."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or missing ({error}); get it again.") from error

    def names(self) -> set[str]:
        return set(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        stored = self._file.get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise UserError(f"Tensor {name!r} has type {stored}; weights are {', '.join(_FLOATS)}.")
        return self._file.get_tensor(name).astype(np.float32)


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is missing or not an index of weight files.") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise UserError(f"{index} names a file outside its folder: {outside[0]!r}.")
    return sorted(index.parent / name for name in names)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file, marked as torch's, without which `transformers` refuses it."""
    # Not `save_file`: its files can be read by their owner only.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
