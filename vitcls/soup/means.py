"""Averages of weights of one network: means, greedy soups, points on a line.

Weights are trees of float32 numpy arrays on the host. They are read one after the other, so memory
does not grow with their number. Sums are float64, so the mean of equal weights equals them bit for
bit.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any
Metrics = dict[str, float]


class Addition(NamedTuple):
    """A trial of a greedy soup: the weights added, and the metrics of the soup with them."""

    name: str
    metrics: Metrics
    is_kept: bool


class GreedySoup(NamedTuple):
    """The mean of the weights kept, the metrics of each alone, and the trials in order."""

    weights: PyTree
    alone: dict[str, Metrics]
    additions: list[Addition]


def average(trees: Iterable[PyTree]) -> PyTree:
    """Returns the mean, a uniform soup (Wortsman et al. 2022, arXiv:2203.05482).

    Args:
      trees: One or more weights of the same shapes.
    """
    total, count = None, 0
    for tree in trees:
        total, count = _add(total, tree), count + 1
    return _mean(total, count)


def greedy(
    names: Sequence[str],
    load: Callable[[str], PyTree],
    evaluate: Callable[[str, PyTree], Metrics],
    *,
    score: Callable[[Metrics], float],
) -> GreedySoup:
    """Makes a greedy soup: Wortsman et al. 2022 (arXiv:2203.05482), recipe 1.

    Weights are added from the best to the worst, and kept unless the mean with them scores lower.

    Args:
      names: One or more names of weights. Equal scores keep their order.
      load: Returns the weights of a name; called twice for each.
      evaluate: Returns the metrics of weights; the text describes them for the log.
      score: Returns the score of metrics, higher is better. Weights with nan are never added.
    """

    def finite_score(metrics: Metrics) -> float:
        value = score(metrics)
        return value if math.isfinite(value) else -math.inf

    alone = {name: evaluate(name, load(name)) for name in names}
    total, num_kept, best = None, 0, -math.inf
    additions = []
    for name in sorted(names, key=lambda name: -finite_score(alone[name])):
        candidate = _add(total, load(name))
        # The mean of the first alone equals it bit for bit, so it has been evaluated already.
        metrics = alone[name]
        if num_kept:
            metrics = evaluate(f"{num_kept} and {name}", _mean(candidate, num_kept + 1))
        is_kept = not num_kept or -math.inf < finite_score(metrics) >= best
        if is_kept:
            total, num_kept, best = candidate, num_kept + 1, finite_score(metrics)
        additions.append(Addition(name, metrics, is_kept))
    return GreedySoup(_mean(total, num_kept), alone, additions)


def interpolate(start: PyTree, end: PyTree, alpha: float) -> PyTree:
    """Returns (1 - alpha) start + alpha end; for 0 and 1 one of them bit for bit."""
    if alpha in (0, 1):  # -0.0 + 0.0 would lose its sign
        return end if alpha else start

    def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((1 - alpha) * np.float64(a) + alpha * np.float64(b)).astype(np.float32)

    return jax.tree.map(between, start, end)


def _add(total: PyTree | None, tree: PyTree) -> PyTree:
    if total is None:
        return jax.tree.map(np.float64, tree)
    return jax.tree.map(np.add, total, tree)  # float64 + float32


def _mean(total: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: (leaf / count).astype(np.float32), total)
