"""Tables that say which tensors of a checkpoint make up each variable, and back.

Variables are parameters and, with BatchNorm, running statistics, as flax has them: `{"params":
..., "batch_stats": ...}`.

A family's table is written once and read in both directions, so that loading tests saving.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vitcls.errors import UserError
from vitcls.models.vit_config import HEADS, ViTConfig
from vitcls.pretrained import values
from vitcls.pretrained.files.flax_file import FlaxWeights
from vitcls.pretrained.files.formats import Weights
from vitcls.pretrained.files.torch_file import TorchWeights

_MAX_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Transform:
    """How the tensors of a checkpoint make a variable (`join`), and back (`split`)."""

    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray, int], Sequence[np.ndarray]]  # variable, number of tensors


@dataclasses.dataclass(frozen=True)
class Key:
    """One variable, and the tensors that make it."""

    ours: str  # "/" between the names of modules
    theirs: tuple[str, ...]
    transform: Transform
    collection: str = "params"  # or "batch_stats"

    @property
    def path(self) -> str:
        """Name among all variables."""
        return f"{self.collection}/{self.ours}"


SAME = Transform(join=lambda tensors: tensors[0], split=lambda param, _: [param])
# torch keeps a Linear's weight (out, in), we keep kernels (in, out). Several tensors become one
# fused kernel, side by side.
LINEAR = Transform(
    join=lambda tensors: np.concatenate(tensors).T,
    split=lambda param, count: np.split(param.T, count),
)
# A convolution: theirs (out, in, height, width), ours (height, width, in, out).
CONV = Transform(
    join=lambda tensors: tensors[0].transpose(2, 3, 1, 0),
    split=lambda param, _: [param.transpose(3, 2, 0, 1)],
)
BIAS = Transform(join=np.concatenate, split=np.split)
# torch keeps these without our leading axes: (D,) for (1, 1, D), and (N, D) for (1, N, D).
ROW = Transform(join=lambda tensors: tensors[0][None, None], split=lambda param, _: [param[0, 0]])
TABLE = Transform(join=lambda tensors: tensors[0][None], split=lambda param, _: [param[0]])


def patch_kernel(patch_size: tuple[int, int]) -> Transform:
    """A convolution (D, 3, p, q) whose stride is its size <-> the kernel (p q 3, D)."""

    def split(param: np.ndarray, _: int) -> list[np.ndarray]:
        return [param.reshape(*patch_size, 3, -1).transpose(3, 2, 0, 1)]

    return Transform(
        join=lambda tensors: tensors[0].transpose(2, 3, 1, 0).reshape(-1, len(tensors[0])),
        split=split,
    )


def patches(config: ViTConfig, theirs: str) -> list[Key]:
    """Keys of a ViT's patch embedding, a convolution named `theirs`."""
    ours = "embeddings/patch_embedding"
    table = [Key(f"{ours}/kernel", (f"{theirs}.weight",), patch_kernel(config.patch_size))]
    return table + ([Key(f"{ours}/bias", (f"{theirs}.bias",), SAME)] if config.patch_bias else [])


def norm(ours: str, theirs: str) -> list[Key]:
    """Keys of a LayerNorm."""
    return [
        Key(f"{ours}/scale", (f"{theirs}.weight",), SAME),
        Key(f"{ours}/bias", (f"{theirs}.bias",), SAME),
    ]


def batch_norm(ours: str, theirs: str) -> list[Key]:
    """Keys of a BatchNorm, with its running statistics."""
    return [
        *norm(ours, theirs),
        Key(f"{ours}/mean", (f"{theirs}.running_mean",), SAME, "batch_stats"),
        Key(f"{ours}/var", (f"{theirs}.running_var",), SAME, "batch_stats"),
    ]


def dense(ours: str, *theirs: str, bias: bool = True) -> list[Key]:
    """Keys of a dense layer, which may be several of theirs side by side."""
    table = [Key(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), LINEAR)]
    biases = Key(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), BIAS)
    return [*table, biases] if bias else table


def heads(*theirs: str) -> list[Key]:
    """Keys of the head, and with two names also of the distillation token's head."""
    return [key for ours, name in zip(HEADS, theirs, strict=False) for key in dense(ours, name)]


def load(
    weights: Weights | FlaxWeights | TorchWeights,
    table: Sequence[Key],
    *,
    shapes: Mapping[str, Any],
    ignored: Iterable[str],
    source: str,
) -> dict[str, Any]:
    """Reads every variable, strictly: each tensor is used or ignored, each variable is found.

    Args:
      weights: The checkpoint's tensors.
      table: Its family's keys, one for each variable.
      shapes: The network's variables as nested dicts of things with a `shape`.
      ignored: Names of tensors that may be there and are not used.
      source: The checkpoint, as messages name it.

    Returns:
      Nested dicts of float32 arrays.

    Raises:
      UserError: tensors are missing, left over or of another shape, or have values that no network
        can use; lists all of them.
    """
    shapes = {name: leaf.shape for name, leaf in flatten_dict(dict(shapes), sep="/").items()}
    assert shapes.keys() == {key.path for key in table}, "the table does not fit the network"
    expected = {}
    for key in table:
        dummy = np.broadcast_to(np.float32(0), shapes[key.path])
        tensors = key.transform.split(dummy, len(key.theirs))
        expected |= {name: t.shape for name, t in zip(key.theirs, tensors, strict=True)}
    names = weights.names()
    _check(
        source,
        missing=sorted(expected.keys() - names),
        unused=sorted(names - expected.keys() - set(ignored)),
        misshaped=[
            f"{name} is {weights.shape(name)}, not {shape}"
            for name, shape in sorted(expected.items())
            if name in names and weights.shape(name) != shape
        ],
    )
    variables, flaws = {}, []
    for key in table:
        # float64 beyond the range of float32 becomes infinite, which is a flaw like any other.
        with np.errstate(over="ignore"):
            tensors = [weights.read(name) for name in key.theirs]
        flaws += map(values.flaw, key.theirs, tensors)
        variables[key.path] = np.ascontiguousarray(key.transform.join(tensors))
    values.refuse(flaws, source=repr(source), advice="Get it again, or choose another checkpoint.")
    return unflatten_dict(variables, sep="/")


def _check(source: str, *, missing: list[str], unused: list[str], misshaped: list[str]) -> None:
    problems = [
        f"  {len(items)} {what}: {', '.join(items[:_MAX_LISTED])}"
        + (", ..." if len(items) > _MAX_LISTED else "")
        for what, items in (
            ("missing", missing),
            ("not known to this network", unused),
            ("of another shape", misshaped),
        )
        if items
    ]
    if problems:
        raise UserError(
            f"The tensors in {source!r} do not fit the network that its config describes:\n"
            + "\n".join(problems)
        )


def dump(variables: Mapping[str, Any], table: Sequence[Key]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint that `load` would read as `variables`: the way back."""
    variables = flatten_dict(dict(variables), sep="/")
    assert variables.keys() == {key.path for key in table}, "the table does not fit the network"
    tensors = {}
    for key in table:
        parts = key.transform.split(np.asarray(variables[key.path]), len(key.theirs))
        tensors |= dict(zip(key.theirs, map(np.ascontiguousarray, parts), strict=True))
    return tensors
