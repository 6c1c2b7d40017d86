"""What happens to images on the device, inside the compiled step.

B batch, H W pixels, K classes. All randomness comes from `keys`, one per image, so that a
batch can be split, moved or repeated without changing what any image becomes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vitcls.augment import mixing, pixels, policies

# What each random step folds into an image's key; the flip uses the key itself.
_VERTICAL_FLIP, _ROTATION, _POLICY, _JITTER, _ERASING, _NOISE, _MIXING = range(1, 8)

Batch = dict[str, jax.Array]
# (keys (B,), batch) -> images float32 (B, H, W, 3), targets float32 (B, K), weights float32 (B,)
Prepare = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array, jax.Array]]


def normalise(
    images: jax.Array, *, rescale: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Returns `(images * rescale - mean) / std`, float32 (B, H, W, 3), from uint8."""
    images = images.astype(jnp.float32) * rescale
    return (images - jnp.asarray(mean, jnp.float32)[None, None, None]) / jnp.asarray(
        std, jnp.float32
    )[None, None, None]


def random_flip(keys: jax.Array, images: jax.Array, *, axis: int = 2) -> jax.Array:
    """Mirrors each image left and right, or along another axis, with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], jnp.flip(images, axis), images)


def sample_uniform(
    keys: jax.Array, low: float, high: float, shape: tuple[int, ...] = ()
) -> jax.Array:
    """Samples numbers between `low` and `high`, float32 (B, *shape)."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=low, maxval=high))(keys)


def smooth_labels(targets: jax.Array, smoothing: float) -> jax.Array:
    """Spreads the share `smoothing` of each target evenly over all K classes.

    Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]


def make_prepare(
    normalise: Callable[[jax.Array], jax.Array],
    *,
    label_smoothing: float,
    flip: bool,
    vertical_flip: bool = False,
    rotation: float = 0.0,
    policy: str = "none",
    num_ops: int = 2,
    magnitude: float = 9.0,
    color_jitter: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    erasing: float = 0.0,
) -> Prepare:
    """Returns the function that makes the loader's batch the input of the network and the loss.

    The steps run in the order of the arguments. A step that is off costs nothing.

    Args:
      normalise: uint8 -> float32 images.
      label_smoothing: See `smooth_labels`.
      flip: Whether to mirror every second image.
      vertical_flip: Whether to turn every second image upside down.
      rotation: Largest angle in degrees, sampled evenly in both directions.
      policy: "none", "randaugment" or "trivialaugment".
      num_ops: RandAugment's operations per image.
      magnitude: Their strength, from 0 to 10.
      color_jitter: Spread around 1 of the factors of brightness, contrast and saturation.
      mixup: Alpha of Mixup; 0: no Mixup.
      cutmix: Alpha of CutMix; 0: no CutMix. Both need batches of whole pairs, see `mixing`.
      erasing: Probability that a box of an image becomes noise.
    """

    def prepare(keys, batch):
        images, weights = batch["image"], batch["mask"]
        targets = smooth_labels(batch["targets"], label_smoothing)
        size = images.shape[1:3]

        def keys_of(step):
            return jax.vmap(jax.random.fold_in, (0, None))(keys, step)

        # On uint8: a quarter of the bytes, and what these steps are defined on.
        if flip:
            images = random_flip(keys, images)
        if vertical_flip:
            images = random_flip(keys_of(_VERTICAL_FLIP), images, axis=1)
        if rotation:
            degrees = sample_uniform(keys_of(_ROTATION), -rotation, rotation)
            images = pixels.to_each(pixels.rotate, images, degrees)
        if policy != "none":
            sample = policies.sample_trivialaugment
            if policy == "randaugment":
                sample = functools.partial(
                    policies.sample_randaugment, num_ops=num_ops, magnitude=magnitude
                )
            operations, values = sample(keys_of(_POLICY), size=size)
            images = pixels.apply_all(images, operations, values)
        if color_jitter:
            low, high = 1 - color_jitter, 1 + color_jitter
            factors = sample_uniform(keys_of(_JITTER), low, high, (3,))
            images = jax.vmap(pixels.jitter)(images, factors)

        images = normalise(images)
        if mixup or cutmix:
            pair_keys = keys_of(_MIXING).reshape(-1, 2)[:, 0]
            shares, boxes = mixing.sample_mixes(pair_keys, mixup=mixup, cutmix=cutmix, size=size)
            images, targets = mixing.mix(images, targets, weights, shares, boxes)
        if erasing:  # after mixing, as timm does, or each noise would show in two images
            boxes = mixing.sample_erased(keys_of(_ERASING), probability=erasing, size=size)
            images = mixing.erase(images, boxes, keys_of(_NOISE))
        return images, targets, weights

    return prepare
