"""Means of weights against torch's and numpy's, and the greedy choice against a plain loop."""

import math
import tracemalloc

import jax
import numpy as np
import pytest
import torch

from vitcls.logs import parameters
from vitcls.soup import means


def make_trees(num: int, *, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (5, 3), "bias": (3,), "scale": ()}
    return [
        {
            "params": {
                name: np.asarray(rng.normal(size=shape), np.float32)
                for name, shape in shapes.items()
            },
            "batch_stats": {"mean": rng.normal(size=4).astype(np.float32)},
        }
        for _ in range(num)
    ]


def flat(tree: dict) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_same_bits(one: dict, other: dict) -> None:
    assert parameters.sha256(one) == parameters.sha256(other)
    assert flat(one).dtype == np.float32
    np.testing.assert_array_equal(flat(one).view(np.int32), flat(other).view(np.int32))


def test_a_soup_of_one_or_of_equals_is_that_checkpoint_bit_for_bit():
    (tree,) = make_trees(1)
    tree["params"]["bias"][:] = (0.1, -0.0, 1e-45)  # a denormal number, too
    for num in (1, 3, 7):
        assert_same_bits(means.average([tree] * num), tree)
    greedy = means.greedy(["a"], lambda name: tree, lambda what, tree: {"x": 0.5}, score=get_x)
    assert_same_bits(greedy.weights, tree)


def test_uniform_is_torchs_average():
    trees = make_trees(5)
    expected = torch.stack([torch.from_numpy(flat(tree)) for tree in trees]).double().mean(0)
    found = means.average(iter(trees))
    np.testing.assert_array_equal(flat(found), expected.float().numpy())
    assert {leaf.shape for leaf in found["params"].values()} == {(5, 3), (3,), ()}


def test_memory_does_not_grow_with_the_number():
    def peak(num: int) -> int:
        tracemalloc.start()
        means.average({"w": np.full(1 << 18, i, np.float32)} for i in range(num))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(12) < 1.1 * peak(3)


def get_x(metrics: dict) -> float:
    return metrics["x"]


def plain_greedy(trees: dict, measure) -> tuple[list[str], np.ndarray]:
    """Recipe 1 of the paper, with all weights in memory."""
    kept = []
    for name in sorted(trees, key=lambda name: measure(trees[name]), reverse=True):
        with_it = np.mean([trees[n] for n in [*kept, name]], axis=0)
        if not kept or measure(with_it) >= measure(np.mean([trees[n] for n in kept], axis=0)):
            kept.append(name)
    return kept, np.mean([trees[n] for n in kept], axis=0)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_papers_recipe(seed):
    trees = {f"run{i}": tree for i, tree in enumerate(make_trees(6, seed=seed))}
    target = flat(means.average(trees.values())).astype(np.float64)

    def measure(weights: np.ndarray) -> float:  # rounded: so there are ties, as accuracies have
        return -round(float(np.square(weights - target).sum()), 1)

    found = means.greedy(
        list(trees), trees.get, lambda what, tree: {"x": measure(flat(tree))}, score=get_x
    )
    kept, expected = plain_greedy(
        {n: flat(t).astype(np.float64) for n, t in trees.items()}, measure
    )
    assert [addition.name for addition in found.additions if addition.is_kept] == kept
    np.testing.assert_allclose(flat(found.weights), expected, rtol=1e-6, atol=1e-7)
    assert measure(flat(found.weights)) >= max(get_x(metrics) for metrics in found.alone.values())
    assert len(found.additions) == 6


def test_what_is_no_number_is_added_last_and_not_kept():
    trees = dict(zip("abc", make_trees(3), strict=True))
    digests = {parameters.sha256(tree): name for name, tree in trees.items()}
    scores = {"a": math.nan, "b": 0.5, "c": 0.75}

    def evaluate(what, tree):
        return {"x": scores.get(digests.get(parameters.sha256(tree)), math.nan)}

    found = means.greedy("abc", trees.get, evaluate, score=get_x)
    assert [(a.name, a.is_kept) for a in found.additions] == [
        ("c", True), ("b", False), ("a", False),
    ]  # fmt: skip
    assert_same_bits(found.weights, trees["c"])


def test_of_scores_that_are_no_numbers_one_is_kept_and_no_other_added():
    trees = dict(zip("ab", make_trees(2), strict=True))
    found = means.greedy("ab", trees.get, lambda what, tree: {"x": math.nan}, score=get_x)
    assert [(a.name, a.is_kept) for a in found.additions] == [("a", True), ("b", False)]


def test_the_line_between_two_weights_is_torchs_lerp():
    start, end = make_trees(2)
    start["params"]["bias"][:] = end["params"]["bias"][1:] = -0.0
    assert_same_bits(means.interpolate(start, end, 0.0), start)
    assert_same_bits(means.interpolate(start, end, 1.0), end)
    for alpha in (0.3, 0.5):
        found = flat(means.interpolate(start, end, alpha))
        ends = (torch.from_numpy(flat(tree)).double() for tree in (start, end))
        np.testing.assert_allclose(found, torch.lerp(*ends, alpha).numpy(), rtol=1e-6)
