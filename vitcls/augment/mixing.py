"""Mixup and CutMix of neighbours, and random erasing: what rectangles and pairs do to images.

B batch, P pairs (rows 2 i and 2 i + 1 of the batch, so B = 2 P), H W pixels, K classes. A box is
(top, left, bottom, right) in pixels, int32, the last two exclusive; (0, 0, 0, 0) is empty.
"""

import jax
import jax.numpy as jnp

# timm's: share of the image's area, and height / width, sampled evenly in its logarithm.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
_NUM_ATTEMPTS = 10  # for a box that fits


def inside(boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns which pixels of images of (height, width) are in their box, bool (B, H, W)."""
    y, x = jnp.arange(size[0])[None, :, None], jnp.arange(size[1])[None, None]
    top, left, bottom, right = (boxes[:, side, None, None] for side in range(4))
    return (top <= y) & (y < bottom) & (left <= x) & (x < right)


def sample_erased(keys: jax.Array, *, probability: float, size: tuple[int, int]) -> jax.Array:
    """Samples the boxes (B, 4) of random erasing, empty where nothing is erased.

    Zhong et al. 2017, arXiv:1708.04896, with timm's ranges.
    """
    height, width = size

    def one(key):
        sampled = jax.random.uniform(key, (3 + 2 * _NUM_ATTEMPTS,))
        use, y, x = sampled[:3]
        area, aspect = sampled[3:].reshape(2, _NUM_ATTEMPTS)
        area = (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area) * height * width
        aspect = ERASED_ASPECT[0] * (ERASED_ASPECT[1] / ERASED_ASPECT[0]) ** aspect
        heights, widths = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        fits = (heights < height) & (widths < width)
        first = jnp.argmax(fits)
        box_height, box_width = heights[first], widths[first]
        top = jnp.floor(y * (height - box_height + 1))
        left = jnp.floor(x * (width - box_width + 1))
        box = jnp.stack([top, left, top + box_height, left + box_width]).astype(jnp.int32)
        return jnp.where((use < probability) & fits[first], box, 0)

    return jax.vmap(one)(keys)


def erase(images: jax.Array, boxes: jax.Array, keys: jax.Array) -> jax.Array:
    """Replaces the boxes (B, 4) of normalised images by noise, a standard normal per value."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    return jnp.where(inside(boxes, images.shape[1:3])[..., None], noise, images)


def sample_mixes(
    keys: jax.Array, *, mixup: float, cutmix: float, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Samples how each pair is mixed: by Mixup or by CutMix, equally likely if both are on.

    Zhang et al. 2017, arXiv:1710.09412, and Yun et al. 2019, arXiv:1905.04899.

    Args:
      keys: (P,).
      mixup: Alpha of Mixup's Beta(alpha, alpha); 0: no Mixup.
      cutmix: Alpha of CutMix; one of the two is positive.
      size: (height, width) of the images.

    Returns:
      Share float32 (P,) that an image keeps of itself outside the box, and boxes int32 (P, 4) that
      its neighbour's pixels fill. Mixup's boxes are empty, CutMix' shares are 1.
    """
    height, width = size

    def one(key):
        key, share_key = jax.random.split(key)
        which, y, x = jax.random.uniform(key, (3,))
        is_cutmix = which < (0.5 if mixup and cutmix else bool(cutmix))
        alpha = jnp.where(is_cutmix, cutmix, mixup)
        share = jax.random.beta(share_key, alpha, alpha)
        box = jnp.stack(cut_box(share, jnp.floor(height * y), jnp.floor(width * x), size))
        return jnp.where(is_cutmix, 1.0, share), jnp.where(is_cutmix, box.astype(jnp.int32), 0)

    return jax.vmap(one)(keys)


def cut_box(
    share: jax.Array, y: jax.Array, x: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, ...]:
    """Returns the sides of CutMix' box around (y, x), which leaves `share` of the image.

    More, where the image's border cuts the box.
    """
    height, width = size
    box_height, box_width = (jnp.floor(side * jnp.sqrt(1 - share)) for side in size)
    top, left = y - jnp.floor(box_height / 2), x - jnp.floor(box_width / 2)
    ends = (top, left, top + box_height, left + box_width)
    return tuple(
        jnp.clip(end, 0, side) for end, side in zip(ends, (height, width) * 2, strict=True)
    )


def mix(
    images: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    shares: jax.Array,
    boxes: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Mixes both of each pair with the other; targets by the share of the pixels, exactly.

    Args:
      images: float32 (B, H, W, 3).
      targets: float32 (B, K).
      weights: float32 (B,); a pair with an image that does not count, 0, stays as it is.
      shares: float32 (P,), see `sample_mixes`.
      boxes: int32 (P, 4), see `sample_mixes`.

    Returns:
      Images and targets, as they came.
    """
    height, width = images.shape[1:3]
    both_count = jnp.min(weights.reshape(-1, 2), axis=1) > 0
    shares, boxes = jnp.where(both_count, shares, 1), jnp.where(both_count[:, None], boxes, 0)
    own_pixels = jnp.where(inside(boxes, (height, width)), 0, shares[:, None, None])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    own_target = shares * (1 - areas / (height * width))

    def mixed(array, own):  # (B, ...), (P, ...)
        pairs = array.reshape(-1, 2, *array.shape[1:])
        own = own.reshape(own.shape[0], 1, *own.shape[1:], 1)
        return (own * pairs + (1 - own) * pairs[:, ::-1]).reshape(array.shape)

    return mixed(images, own_pixels), mixed(targets, own_target)
