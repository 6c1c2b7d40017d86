"""What happens to images on the device, inside the compiled step.

B batch, H W pixels, K classes. Everything random draws from `keys`, one per image, so that a
batch can be split, moved or repeated without changing what any image becomes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left and right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def smooth_labels(targets: jax.Array, smoothing: float) -> jax.Array:
    """Spreads the share `smoothing` of each target evenly over all K classes.

    Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]


def make_prepare(
    normalise: Callable[[jax.Array], jax.Array], *, flip: bool, label_smoothing: float
) -> Prepare:
    """Returns the function that turns a batch as loaded into what the network and the loss take.

    Args:
      normalise: uint8 -> float32 images.
      flip: Whether to mirror every second image.
      label_smoothing: See `smooth_labels`.
    """

    def prepare(keys, batch):
        images = batch["image"]
        if flip:  # on uint8: a quarter of the bytes
            images = random_flip(keys, images)
        return normalise(images), smooth_labels(batch["targets"], label_smoothing), batch["mask"]

    return prepare
