"""The helpers of sweep files."""

import itertools
import math

import pytest

from launch import space


def test_grid_has_every_combination_once():
    trials = space.grid({"optim.lr": [1, 2, 3], "optim.weight_decay": (0.0, 0.1)})
    expected = set(itertools.product([1, 2, 3], (0.0, 0.1)))
    assert len(trials) == 6
    assert {(t["optim.lr"], t["optim.weight_decay"]) for t in trials} == expected


def test_random_draws_stay_when_more_are_asked_for():
    values = {"optim.lr": space.log_uniform(1e-5, 1e-1), "optim.name": ["sgd", "adamw"]}
    few, many = space.random(5, values), space.random(400, values)
    assert many[:5] == few
    assert space.random(5, values, seed=1) != few
    rates = [trial["optim.lr"] for trial in many]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert {trial["optim.name"] for trial in many} == {"sgd", "adamw"}
    # Even in the logarithm: the mean of 400 is the middle, up to four standard errors.
    mean = sum(map(math.log10, rates)) / len(rates)
    assert mean == pytest.approx(-3, abs=4 * (4 / math.sqrt(12)) / 20)


def test_uniform_draws_have_three_digits():
    trials = space.random(50, {"optim.ema_decay": space.uniform(0.9, 0.99)})
    draws = [trial["optim.ema_decay"] for trial in trials]
    assert all(0.9 <= draw <= 0.99 and len(str(draw)) <= 5 for draw in draws)


def test_seeds_runs_all_trials_of_a_seed_before_the_next():
    trials = space.seeds([{"optim.lr": 1}, {"optim.lr": 2}], 2)
    assert [(t["optim.lr"], t["train.seed"]) for t in trials] == [(1, 0), (2, 0), (1, 1), (2, 1)]
