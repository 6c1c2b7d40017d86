"""Boxes and shares are timm's, pairs mix exactly, and rows that do not count stay out."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.augment import mixing

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "augment.npz")
SIZE = (60, 80)
NUM_DRAWS = 10_000
KEYS = jax.random.split(jax.random.key(0), NUM_DRAWS)


def areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@functools.cache
def sample_mixes(*, mixup: float, cutmix: float) -> tuple[np.ndarray, np.ndarray]:
    draw = functools.partial(mixing.sample_mixes, mixup=mixup, cutmix=cutmix, size=SIZE)
    return jax.device_get(jax.jit(draw)(KEYS))


def test_inside_marks_the_box():
    found = np.asarray(mixing.inside(jnp.array([[1, 2, 3, 5], [0, 0, 0, 0], [0, 0, 4, 6]]), (4, 6)))
    expected = np.zeros((3, 4, 6), bool)
    expected[0, 1:3, 2:5] = True
    expected[2] = True
    np.testing.assert_array_equal(found, expected)


def test_cutmix_boxes_of_given_shares_are_timms():
    share, y, x, top, bottom, left, right = GOLDEN["cutmix"].T
    ours = mixing.cut_box(jnp.asarray(share), jnp.asarray(y), jnp.asarray(x), SIZE)
    np.testing.assert_array_equal(jnp.stack(ours), [top, left, bottom, right])


def test_each_pair_takes_mixup_or_cutmix_with_its_own_alpha():
    shares, boxes = sample_mixes(mixup=0.2, cutmix=1.0)
    is_mixup = ~boxes.any(axis=1)  # an image may keep all of itself: shares of 1 do not tell
    assert abs(np.mean(is_mixup) - 0.5) < 0.025
    assert np.all(shares[~is_mixup] == 1)
    assert_beta(shares[is_mixup], 0.2)
    ours = np.quantile(areas(boxes[~is_mixup]) / (60 * 80), GOLDEN["quantiles"])
    np.testing.assert_allclose(ours, GOLDEN["cutmix_areas"], atol=0.03)
    centres = (boxes[~is_mixup, :2] + boxes[~is_mixup, 2:]) / 2
    np.testing.assert_allclose(centres.mean(0), [30, 40], atol=1)


def test_mixup_alone_is_for_all():
    shares, boxes = sample_mixes(mixup=1.0, cutmix=0.0)
    assert not boxes.any()
    assert_beta(shares, 1.0)


def assert_beta(shares: np.ndarray, alpha: float):
    """Mean 1 / 2 and variance 1 / (4 (2 alpha + 1))."""
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * np.sqrt(variance / len(shares))
    assert abs(shares.var() - variance) < 0.05 * variance
    assert 0 <= shares.min() < shares.max() <= 1


def make_pairs(num: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((num, *SIZE, 3)).astype(np.float32)
    targets = rng.dirichlet(np.ones(5), num).astype(np.float32)
    return images, targets


def test_mixup_is_the_weighted_mean_of_both_and_for_both():
    (images, targets), shares = make_pairs(4), np.float32([0.3, 1])
    mixed, mixed_targets = mixing.mix(
        images, targets, jnp.ones(4), jnp.asarray(shares), jnp.zeros((2, 4), jnp.int32)
    )
    for got, whole in [(mixed, images), (mixed_targets, targets)]:
        expected = [0.3 * whole[0] + 0.7 * whole[1], 0.3 * whole[1] + 0.7 * whole[0], *whole[2:]]
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_cutmix_targets_are_the_share_of_the_pixels():
    images, targets = make_pairs(64)
    shares, boxes = sample_mixes(mixup=0.2, cutmix=1.0)
    shares, boxes = (x[boxes.any(axis=1)][:32] for x in (shares, boxes))
    mixed, mixed_targets = jax.device_get(
        mixing.mix(images, targets, jnp.ones(64), jnp.asarray(shares), jnp.asarray(boxes))
    )
    own = np.mean(np.all(mixed == images, axis=-1), axis=(1, 2))
    other = images.reshape(32, 2, *SIZE, 3)[:, ::-1].reshape(images.shape)
    assert np.all(np.all(mixed == images, axis=-1) | np.all(mixed == other, axis=-1))
    assert own.min() < 0.4 < 0.9 < own.max()
    others = targets.reshape(32, 2, 5)[:, ::-1].reshape(targets.shape)
    expected = own[:, None] * targets + (1 - own[:, None]) * others
    np.testing.assert_allclose(mixed_targets, expected, atol=1e-6)
    np.testing.assert_allclose(mixed_targets.sum(1), 1, rtol=1e-6)


def test_rows_that_do_not_count_are_not_mixed_into_others():
    images, targets = make_pairs(8)
    weights = np.float32([1, 0, 0, 1, 1, 1, 0, 0])
    boxes = jnp.array([[0, 0, 0, 0], [0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 0, 0]])
    shares = jnp.array([0.5, 1, 1, 0.5])
    mixed, mixed_targets = mixing.mix(images, targets, weights, shares, boxes)
    for got, whole in [(mixed, images), (mixed_targets, targets)]:
        np.testing.assert_array_equal(got[:4], whole[:4])
        assert np.any(np.asarray(got[4:6]) != whole[4:6])


def test_erased_boxes_are_as_many_and_as_large_as_timms():
    draw = functools.partial(mixing.sample_erased, probability=0.25, size=SIZE)
    boxes = jax.device_get(jax.jit(draw)(KEYS))
    used = boxes[areas(boxes) > 0]
    assert abs(len(used) - GOLDEN["num_erased"]) < 5 * np.sqrt(2 * NUM_DRAWS * 0.25 * 0.75)
    ours = np.quantile(areas(used) / (60 * 80), GOLDEN["quantiles"])
    np.testing.assert_allclose(ours, GOLDEN["erased_areas"], atol=0.02)
    aspects = (used[:, 2] - used[:, 0]) / (used[:, 3] - used[:, 1])
    ours = np.quantile(aspects, GOLDEN["quantiles"])
    np.testing.assert_allclose(np.log(ours), np.log(GOLDEN["erased_aspects"]), atol=0.12)
    assert used.min() == 0
    assert used[:, 2:].max(0).tolist() == [60, 80]


def test_erased_boxes_become_noise_and_the_rest_stays():
    images = jnp.full((32, *SIZE, 3), 7.0)
    boxes = jnp.tile(jnp.array([[3, 5, 40, 60], [0, 0, 0, 0]]), (16, 1))
    erased = np.asarray(jax.jit(mixing.erase)(images, boxes, KEYS[:32]))
    is_inside = np.asarray(mixing.inside(boxes, SIZE))
    assert np.all(erased[~is_inside] == 7)
    noise = erased[is_inside]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert len(np.unique(noise)) > 0.99 * noise.size  # every pixel and channel its own
