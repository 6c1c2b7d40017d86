"""Weight files: safetensors, in one file or sharded over several."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitcls.errors import UserError
from vitcls.pretrained import values

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLAX = "flax_model.msgpack"  # see `FlaxWeights`
# The file that shows each format -> globs of all its files; the first that is there is read alone.
FORMATS = {SINGLE: (SINGLE,), INDEX: (INDEX, "model-*.safetensors"), FLAX: (FLAX,)}
# The same of torch's pickles, which are read only when allowed, and last: see `TorchWeights`.
PICKLES = {
    "pytorch_model.bin": ("pytorch_model.bin",),
    "pytorch_model.bin.index.json": ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
}
_FLOATS = ("F64", "F32", "F16", "BF16")


def readable(*, allow_pickle: bool) -> dict[str, tuple[str, ...]]:
    """The entries of `FORMATS`, and those of `PICKLES` if allowed, in the order of preference."""
    return FORMATS | PICKLES if allow_pickle else FORMATS


class Weights:
    """The tensors of a checkpoint by their names; headers are read at once, data when asked for."""

    def __init__(self, directory: Path):
        """Opens the files in `directory`. Raises `UserError` if one is missing or damaged."""
        self._file_of = {}  # tensor name -> open file
        single = directory / SINGLE
        for path in [single] if single.exists() else shards(directory / INDEX):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or missing ({error}); get it again.") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, from any floating-point type."""
        stored = self._file_of[name].get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise UserError(f"Tensor {name!r} has type {stored}; weights are {', '.join(_FLOATS)}.")
        return self._file_of[name].get_tensor(name).astype(np.float32)


def shards(index: Path) -> list[Path]:
    """The files that an index names. Raises `UserError` if it is damaged or leaves its folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is missing or not an index of weight files.") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise UserError(f"{index} names a file outside its folder: {outside[0]!r}.")
    return sorted(index.parent / name for name in names)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file, marked as torch's, without which `transformers` refuses it.

    Raises:
      UserError: a tensor has values that no network can use.
    """
    values.refuse(
        [values.flaw(name, tensor) for name, tensor in tensors.items()],
        source=f"What would be written to {path.name}",
        advice="Choose another checkpoint or, where it overflows a narrow type, a wider one.",
    )
    # Not `save_file`: its files can be read by their owner only.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
