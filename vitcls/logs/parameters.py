"""The table, the memory and the digest of parameters."""

import hashlib
import math
import re
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vitcls.step.train_step import TrainState


def parameter_table(params: Any, frozen: Any, batch_stats: Any) -> str:
    """Returns a table of all parameters; names that differ only by a number share a row.

    Args:
      params: The trained parameters.
      frozen: The parameters that stay as they are.
      batch_stats: Running statistics.
    """
    rows: dict[tuple[str, tuple[int, ...], str], int] = {}
    for tree, kind in [(params, "trained"), (frozen, "frozen"), (batch_stats, "statistics")]:
        for name, leaf in traverse_util.flatten_dict(tree, sep="/").items():
            row = (re.sub(r"\d+", "*", name), leaf.shape, kind)
            rows[row] = rows.get(row, 0) + 1
    cells = [("name", "shape", "copies", "parameters", "")]
    for (name, shape, kind), copies in rows.items():
        size = copies * math.prod(shape)
        cells.append((name, "x".join(map(str, shape)), str(copies), f"{size:,}", kind))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index in (2, 3) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (params, frozen))
    return "\n".join([*lines, f"{trained:,} parameters are trained, {frozen:,} frozen."])


def memory_line(state: TrainState) -> str:
    """Returns the memory of a placed state on each device: `parameters 5.0 MB, ...`."""
    parts = {
        "parameters": (state.params, state.frozen, state.batch_stats),
        "optimizer": state.opt_state,
        "average": state.ema,
        "teacher": state.teacher,
    }
    sizes = {name: bytes_per_device(tree) for name, tree in parts.items() if tree is not None}
    listed = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    return f"On each device: {listed}."


def bytes_per_device(tree: Any) -> int:
    """Bytes of all arrays of `tree` on one device; an array that is split counts as its shard."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def sha256(variables: Any) -> str:
    """Returns the hexadecimal digest of names, shapes and values, however they are stored."""
    digest = hashlib.sha256()
    for name, leaf in sorted(traverse_util.flatten_dict(variables, sep="/").items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
