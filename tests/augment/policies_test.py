"""Operations are drawn as often and as strong as by timm and torchvision: see golden/."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.augment import pixels, policies

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "augment.npz")
SIZE = (60, 80)
NUM_DRAWS = 10_000
KEYS = jax.random.split(jax.random.key(0), NUM_DRAWS)
SIDES = {"translate_x": 80, "translate_y": 60}


def of(source: str) -> dict[str, np.ndarray]:
    return {name.split("/")[1]: GOLDEN[name] for name in GOLDEN if name.startswith(f"{source}/")}


randaugment_of = jax.jit(
    functools.partial(policies.sample_randaugment, num_ops=2, magnitude=9.0, size=SIZE)
)


@functools.cache
def randaugment() -> tuple[np.ndarray, np.ndarray]:
    return jax.device_get(randaugment_of(KEYS))


@functools.cache
def trivialaugment() -> tuple[np.ndarray, np.ndarray]:
    return jax.device_get(
        jax.jit(functools.partial(policies.sample_trivialaugment, size=SIZE))(KEYS)
    )


def drawn(source, name: str) -> np.ndarray:
    operations, values = source()
    return values[operations == pixels.INDEX[name]]


def assert_probability(counts: np.ndarray, probability: float):
    """Within five standard deviations of a binomial count of NUM_DRAWS."""
    deviation = np.sqrt(NUM_DRAWS * probability * (1 - probability))
    np.testing.assert_allclose(counts, NUM_DRAWS * probability, atol=5 * deviation)


@pytest.mark.parametrize("name", sorted(of("timm").keys() - {"degrees"}))
def test_magnitudes_of_randaugment_are_timms(name):
    """timm's posterize keeps no bits at full strength, ours one."""
    scale = policies._RANDAUGMENT[name]
    strengths = jnp.asarray(GOLDEN["levels"], jnp.float32) / 10
    theirs = np.maximum(of("timm")[name], 1 if name == "posterize" else -np.inf)
    ours = scale(strengths, SIZE) / SIDES.get(name, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_magnitudes_of_trivialaugment_are_torchvisions():
    strengths = jnp.arange(31) / 30
    for name, theirs in of("torchvision").items():
        ours = policies._TRIVIALAUGMENT[name](strengths, SIZE)
        if name in SIDES:  # torchvision shifts by whole pixels, and its 16.0 is 15.999999
            theirs = np.trunc(theirs + 1e-5)
        if name in ("brightness", "color", "contrast", "sharpness"):  # what it adds to 1
            theirs = 1 + theirs
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def test_randaugment_draws_each_operation_as_often_as_timm():
    """Half of the rounds do nothing; in the other, all operations are equally likely."""
    operations, _ = randaugment()
    assert operations.shape == (2, NUM_DRAWS)
    for one_round in operations:
        counts = np.bincount(one_round, minlength=len(pixels.OPERATIONS))
        assert_probability(counts[0], 0.5)
        assert_probability(counts[1:], 0.5 / 15)
    both = np.mean((operations[0] == 0) & (operations[1] == 0))
    assert abs(both - 0.25) < 0.025  # rounds are independent


def test_trivialaugment_draws_each_operation_as_often():
    operations, _ = trivialaugment()
    counts = np.bincount(operations[0], minlength=len(pixels.OPERATIONS))
    absent = [pixels.INDEX[name] for name in ("invert", "solarize_add")]
    assert counts[absent].tolist() == [0, 0]
    assert_probability(np.delete(counts, absent), 1 / 14)


def test_randaugment_draws_magnitudes_as_timm():
    degrees = np.abs(drawn(randaugment, "rotate"))
    ours = np.quantile(degrees, GOLDEN["quantiles"])
    np.testing.assert_allclose(ours, GOLDEN["timm/degrees"], atol=0.3)  # of 1.5 degrees' spread
    assert degrees.max() == 30  # magnitudes above 10 count as 10


@pytest.mark.parametrize("source", [randaugment, trivialaugment])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_both_signs_are_equally_likely(source, name):
    values = drawn(source, name)
    values = values[values != 0]
    assert abs(np.mean(values > 0) - 0.5) < 2.5 / np.sqrt(len(values))


def test_trivialaugment_draws_all_strengths_evenly():
    values, counts = np.unique(np.abs(drawn(trivialaugment, "rotate")), return_counts=True)
    np.testing.assert_allclose(values, of("torchvision")["rotate"], atol=1e-4)
    assert counts.min() > counts.mean() - 5 * np.sqrt(counts.mean())
    assert counts.max() < counts.mean() + 5 * np.sqrt(counts.mean())


def test_a_draw_depends_on_its_key_alone():
    order = np.random.default_rng(0).permutation(NUM_DRAWS)
    shuffled = randaugment_of(KEYS[order])
    for found, expected in zip(shuffled, randaugment(), strict=True):
        np.testing.assert_array_equal(found, expected[:, order])
