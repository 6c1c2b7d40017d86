"""torch's weight files: pickles, read only when asked for.

Opening a pickle can run code; torch's own unpickler for weights makes nothing but tensors.
"""

import types
import zipfile
from pathlib import Path

import numpy as np

from vitcls.errors import UserError
from vitcls.pretrained.files import formats

_OLDEST = (2, 10)  # before, a crafted file could run code (CVE-2025-32434, CVE-2026-24747)


def import_torch() -> types.ModuleType:
    """Returns torch, which only pickles need. Raises `UserError` if it is missing or too old."""
    wanted = "{}.{}".format(*_OLDEST)
    advice = f'install the extra vitcls[torch], or run pip install "torch>={wanted}"'
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"Reading a pickle needs torch {wanted} or newer, and there is none; {advice}."
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
        raise UserError(
            f"Reading a pickle safely needs torch {wanted} or newer, this is {torch.__version__}; "
            f"{advice}."
        )
    return torch


class TorchWeights:
    """`formats.Weights` of torch's files, mapped into memory where they are zip files."""

    def __init__(self, path: Path):
        """Reads a file, or those that an index names.

        Raises:
          UserError: one is missing, damaged or holds anything but tensors; or see `import_torch`.
        """
        torch = import_torch()
        self._floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        self._tensors = {}
        for file in [path] if path.suffix == ".bin" else formats.shards(path):
            try:
                self._tensors |= torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
            except Exception as error:  # of many types, whose texts explain how to lift the safety
                raise UserError(
                    f"{file} is missing, damaged, or holds more than tensors by their names "
                    f"({type(error).__name__}); get it again, as safetensors if there are any."
                ) from error
        for name, tensor in self._tensors.items():
            is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if not is_dense or tensor.is_meta or not isinstance(name, str):
                raise UserError(f"{path} has something other than a dense tensor as {name!r}.")

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        """A copy of the tensor as float32, from any floating-point type."""
        tensor = self._tensors[name].detach()
        if tensor.dtype not in self._floats:
            known = ", ".join(map(str, self._floats))
            raise UserError(f"Tensor {name!r} has type {tensor.dtype}; weights are {known}.")
        return tensor.float().numpy().copy()  # of the file's memory, which may change
