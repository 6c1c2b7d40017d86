"""Helpers for sweep files, which describe trials as dicts of config fields.

  from launch.space import grid, log_uniform, random, seeds

  def get_sweep():
      return seeds(grid({"optim.lr": [1e-4, 1e-3], "optim.weight_decay": [0.0, 0.05]}), 3)

A key is a config field, written as after `--config.`, or "config", whose value is the argument of
the config file, such as "init=scratch".
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

Fields = dict[str, Any]


def grid(values: dict[str, Iterable[Any]]) -> list[Fields]:
    """Returns every combination of the fields' values."""
    return [dict(zip(values, combination, strict=True)) for combination in
            itertools.product(*values.values())]  # fmt: skip


def random(
    num_trials: int,
    values: dict[str, Sequence[Any] | Callable[[Random], Any]],
    *,
    seed: int = 0,
) -> list[Fields]:
    """Returns random trials; with a larger `num_trials` the first ones stay the same.

    Args:
      num_trials: Number of trials.
      values: What to sample each field from: a list, `uniform` or `log_uniform`.
      seed: Seed of the samples.
    """
    rng = Random(seed)
    return [
        {field: one(rng) if callable(one) else rng.choice(one) for field, one in values.items()}
        for _ in range(num_trials)
    ]


def uniform(low: float, high: float) -> Callable[[Random], float]:
    """For `random`: samples from `low` to `high`, to three digits, so that names show all."""
    return lambda rng: _three_digits(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Callable[[Random], float]:
    """For `random`: samples the logarithm evenly from `low` to `high`; three digits."""
    return lambda rng: _three_digits(math.exp(rng.uniform(math.log(low), math.log(high))))


def seeds(trials: list[Fields], num_seeds: int) -> list[Fields]:
    """Returns each trial with `train.seed` from 0 to `num_seeds` - 1, ordered by seed.

    So a sweep that is stopped early has compared all trials on the same seeds.
    """
    return [trial | {"train.seed": seed} for seed in range(num_seeds) for trial in trials]


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
