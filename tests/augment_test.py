"""What the device does to images before the network sees them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitcls import augment

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def random_images(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, 5, 7, 3), np.uint8)


def test_normalise_equals_numpy():
    images = random_images(4)
    got = augment.normalise(jnp.asarray(images), rescale=1 / 255, mean=MEAN, std=STD)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (images / 255 - MEAN) / STD, atol=1e-6)


def test_flip_mirrors_about_half_and_depends_on_each_key_alone():
    images = jnp.asarray(random_images(512))
    keys = jax.random.split(jax.random.key(1), 512)
    flipped = augment.random_flip(keys, images)
    same = np.asarray((flipped == images).all((1, 2, 3)))
    mirrored = np.asarray((flipped == images[:, :, ::-1]).all((1, 2, 3)))
    assert np.all(same ^ mirrored)
    assert 200 < mirrored.sum() < 312
    alone = augment.random_flip(keys[100:103], images[100:103])
    np.testing.assert_array_equal(alone, flipped[100:103])


def test_smoothed_targets_still_sum_to_one():
    targets = augment.smooth_labels(jnp.eye(5), 0.1)
    np.testing.assert_allclose(targets.sum(-1), np.ones(5), rtol=1e-6)
    np.testing.assert_allclose(targets[0], [0.92, 0.02, 0.02, 0.02, 0.02], rtol=1e-5)


def test_prepare_does_what_it_is_asked():
    batch = {
        "image": jnp.asarray(random_images(8)),
        "targets": jnp.eye(8),
        "mask": jnp.ones(8),
    }
    keys = jax.random.split(jax.random.key(0), 8)
    normalise = functools.partial(augment.normalise, rescale=1 / 255, mean=MEAN, std=STD)
    images, targets, weights = augment.make_prepare(normalise, flip=False, label_smoothing=0.0)(
        keys, batch
    )
    np.testing.assert_array_equal(images, normalise(batch["image"]))
    np.testing.assert_array_equal(targets, batch["targets"])
    np.testing.assert_array_equal(weights, batch["mask"])
    flipped, smoothed, _ = augment.make_prepare(normalise, flip=True, label_smoothing=0.2)(
        keys, batch
    )
    assert not np.array_equal(flipped, images)
    assert float(smoothed[0, 0]) < 1
