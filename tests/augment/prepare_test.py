"""What the device does to images before the network sees them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.augment import prepare as augment
from vitcls.config.fields import default_config
from vitcls.step import sharding
from vitcls.step import train_step as steps

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


STRONG = dict(
    flip=True,
    vertical_flip=True,
    rotation=20.0,
    policy="randaugment",
    color_jitter=0.3,
    mixup=0.4,
    cutmix=1.0,
    erasing=0.5,
)


@functools.cache
def prepared(size: int, data: int = 1, **kwargs) -> tuple[np.ndarray, ...]:
    """What 16 or fewer images become, in a program for `data` devices."""
    mesh = sharding.make_mesh(data, 1, devices=jax.devices()[:data])
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 12, 20, 3), np.uint8)[:size],
        "targets": np.eye(16, dtype=np.float32)[:size],
        "mask": np.ones(size, np.float32),
    }
    normalise = functools.partial(augment.normalise, rescale=1 / 255, mean=MEAN, std=STD)
    prepare = augment.make_prepare(normalise, label_smoothing=0.1, **kwargs)
    prepare = sharding.on_each_device(prepare, mesh)
    keys = steps.sample_keys(jax.random.key(3), jnp.asarray(5), size)
    batch = sharding.to_global(batch, mesh)
    options = {"xla_llvm_disable_expensive_passes": True}  # most of the time is compilation
    compiled = jax.jit(prepare).lower(keys, batch).compile(compiler_options=options)
    assert not re.search(r"all-(gather|to-all)|collective-permute", compiled.as_text())
    return jax.device_get(compiled(keys, batch))


@pytest.mark.slow
def test_what_an_image_becomes_does_not_depend_on_the_batch_or_the_devices():
    """Of the same key, whatever is beside it: apart from rounding, a level at a few pixels."""
    whole = prepared(16, **STRONG)
    np.testing.assert_allclose(whole[1].sum(1), 1, rtol=1e-6)
    fewer = prepared(8, data=4, **STRONG)
    np.testing.assert_allclose(fewer[1], whole[1][:8], atol=1e-6)
    apart = np.abs(fewer[0] - whole[0][:8])
    assert np.mean(apart > 1e-4) < 0.01
    assert apart.max() < 0.1


@pytest.mark.parametrize(
    "change",
    [
        dict(vertical_flip=True),
        dict(rotation=90.0),
        dict(policy="trivialaugment"),
        dict(color_jitter=0.4),
        dict(cutmix=1.0),
    ],
    ids=str,
)
def test_each_option_changes_about_as_many_images_as_it_says(change):
    plain, targets, _ = prepared(16, flip=False)
    images, changed_targets, _ = prepared(16, flip=False, **change)
    num_changed = np.sum(np.any(images != plain, axis=(1, 2, 3)))
    assert num_changed >= (3 if "vertical_flip" in change else 10)
    assert np.array_equal(targets, changed_targets) == ("cutmix" not in change)
    assert images.shape == plain.shape
    assert np.isfinite(images).all()


def test_rotation_and_jitter_are_drawn_evenly_around_nothing(monkeypatch):
    """Here images become what was drawn for them."""
    for name in ("rotate", "jitter"):
        monkeypatch.setattr(
            augment.pixels, name, lambda image, x: jnp.zeros(image.shape) + x.reshape(1, 1, -1)
        )
    batch = {"image": jnp.zeros((1000, 1, 1, 3), jnp.uint8), "targets": jnp.ones((1000, 1))}
    keys = jax.random.split(jax.random.key(0), 1000)

    def drawn(**kwargs):
        prepare = augment.make_prepare(lambda x: x, flip=False, label_smoothing=0.0, **kwargs)
        return np.asarray(prepare(keys, batch | {"mask": jnp.ones(1000)})[0])[:, 0, 0]

    factors = drawn(color_jitter=0.5)
    for changes in (drawn(rotation=50.0), 100 * (factors - 1)):
        quantiles = np.quantile(changes, [0, 0.25, 0.5, 0.75, 1], axis=0)
        np.testing.assert_allclose(quantiles, [[x] * 3 for x in (-50, -25, 0, 25, 50)], atol=6)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.15


@pytest.mark.slow
def test_erasing_is_after_mixing_and_shows_in_one_image():
    both, mixed = (prepared(16, flip=False, mixup=1.0, erasing=x) for x in (0.5, 0.0))
    is_erased = np.any(both[0] != mixed[0], axis=-1)
    np.testing.assert_array_equal(both[1], mixed[1])
    shares = is_erased.mean((1, 2))
    assert 0 < np.sum(shares > 0) < 16
    assert np.all(shares <= 0.34)
    assert not np.any(is_erased[::2] & is_erased[1::2], axis=(1, 2)).all()


def test_what_is_off_costs_nothing_and_every_option_counts():
    normalise = functools.partial(augment.normalise, rescale=1 / 255, mean=MEAN, std=STD)
    batch = {"image": jnp.zeros((4, 8, 8, 3), jnp.uint8), "targets": jnp.eye(4)}
    batch["mask"] = jnp.ones(4)
    keys = jax.random.split(jax.random.key(0), 4)

    def program(**kwargs):
        prepare = augment.make_prepare(normalise, label_smoothing=0.1, **kwargs)
        return str(jax.make_jaxpr(prepare)(keys, batch))

    defaults = {name: value for name, value in default_config().augment.items() if name != "flip"}
    plain, randaugment = program(flip=True), program(flip=True, policy="randaugment")
    assert program(flip=True, **defaults) == plain
    assert defaults.keys() == STRONG.keys() - {"flip"} | {"num_ops", "magnitude"}
    assert program(flip=False) != plain
    for name in STRONG.keys() - {"flip"}:
        assert program(flip=True, **{name: STRONG[name]}) != plain, name
    for change in ({"num_ops": 3}, {"magnitude": 5.0}):
        assert program(flip=True, policy="randaugment", **change) != randaugment
