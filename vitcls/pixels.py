"""Pillow's operations, on a batch in the compiled step: one operation and one strength per image.

B batch, H W pixels. Images are uint8 (B, H, W, 3) before and after every function, with results
cut off to whole numbers where Pillow cuts them off: they differ by one level at most, where float32
falls on the other side of a whole number.

Under `vmap`, `lax.switch` would compute every operation for every image. `apply` computes four
stages instead: a table of levels, a blend of colours, a filter, and a resampling.
"""

import jax
import jax.numpy as jnp

FILL = 128  # grey, for what comes from outside the image: timm's default
OPERATIONS = (  # and what the value of each means, if anything
    "identity",
    "autocontrast",
    "equalize",
    "invert",
    "posterize",  # bits that are kept
    "solarize",  # the lowest level that is inverted
    "solarize_add",  # levels added to those below 128
    "brightness",  # factors: 1 changes nothing
    "contrast",
    "color",
    "sharpness",
    "rotate",  # degrees counterclockwise
    "shear_x",  # slopes
    "shear_y",
    "translate_x",  # pixels to the left
    "translate_y",  # pixels up
)
INDEX = {name: index for index, name in enumerate(OPERATIONS)}


def apply(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Applies to each image its operation.

    Args:
      images: uint8 (B, H, W, 3).
      operations: int32 (B,), indices into `OPERATIONS`.
      values: float32 (B,), see there.
    """
    # All stages read `images`: XLA fuses stages that read one another's results, and computes the
    # first once more for every pixel that a later one reads.
    stages = {
        "color": blend(grey(images)[..., None], images, values),
        "sharpness": blend(smooth(images), images, values),
    }
    resampled = transform(images, matrices(operations, values, *images.shape[1:3]))
    stages |= dict.fromkeys(OPERATIONS[INDEX["rotate"] :], resampled)
    result = look_up(images, tables(images, operations, values))
    for name, changed in stages.items():
        result = jnp.where((operations == INDEX[name])[:, None, None, None], changed, result)
    return result


def apply_all(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Applies to each image its operations, int32 (R, B), one after the other."""
    # A loop keeps XLA from fusing one round into the next, see `apply`.
    return jax.lax.scan(lambda x, drawn: (apply(x, *drawn), None), images, (operations, values))[0]


def jitter(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Changes brightness, contrast and saturation, in this order, by factors float32 (B, 3)."""
    images = blend(jnp.zeros((1, 1, 1, 1)), images, factors[:, 0])
    images = blend(mean_grey(images)[:, None, None, None], images, factors[:, 1])
    return blend(grey(images)[..., None], images, factors[:, 2])


def rotate(images: jax.Array, degrees: jax.Array) -> jax.Array:
    """Rotates about the centre, counterclockwise, by degrees float32 (B,)."""
    operations = jnp.full(degrees.shape, INDEX["rotate"])
    return transform(images, matrices(operations, degrees, *images.shape[1:3]))


def blend(origin: jax.Array, images: jax.Array, factors: jax.Array) -> jax.Array:
    """`origin + factor * (images - origin)`, clipped; factors (B,), the others (B or 1, ...)."""
    factors = factors.reshape(-1, *[1] * (images.ndim - 1))
    origin = origin.astype(jnp.float32)
    return jnp.clip(origin + factors * (images - origin), 0, 255).astype(jnp.uint8)


def grey(images: jax.Array) -> jax.Array:
    """Returns the luma, int32 (B, H, W), with Pillow's fixed-point weights."""
    red, green, blue = (images[..., channel].astype(jnp.int32) for channel in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def mean_grey(images: jax.Array) -> jax.Array:
    """Returns each image's mean luma, rounded, uint32 (B,)."""
    size = images.shape[1] * images.shape[2]
    return (2 * jnp.sum(grey(images), axis=(1, 2), dtype=jnp.uint32) + size) // (2 * size)


def smooth(images: jax.Array) -> jax.Array:
    """The mean over 3 x 3 pixels, the middle one counting five times; the border as it is."""
    wide = images.astype(jnp.int32)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    return images.at[:, 1:-1, 1:-1].set(((2 * sums + 13) // 26).astype(jnp.uint8))


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Replaces each level by the entry of its channel's table, uint8 (B, 3, 256)."""
    flat = tables.reshape(-1, 3 * 256)
    levels = _flat_levels(images)
    found = jnp.take_along_axis(flat, levels, axis=1, mode="promise_in_bounds")
    return found.reshape(images.shape)


def tables(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Returns what the operations that see each level by itself make of the 256 levels.

    Args:
      images: uint8 (B, H, W, 3).
      operations: int32 (B,); those of other stages leave the levels as they are.
      values: float32 (B,).

    Returns:
      uint8 (B, 3, 256).
    """
    levels = jnp.arange(256)[None, None]
    counts = histograms(images)
    value = values[:, None, None]
    whole = value.astype(jnp.int32)
    tables = {
        "autocontrast": _stretched(counts),
        "equalize": _equalized(counts),
        "invert": 255 - levels,
        "posterize": levels & (256 - (256 >> whole)),
        "solarize": jnp.where(levels < value, levels, 255 - levels),
        "solarize_add": jnp.where(levels < 128, jnp.minimum(levels + whole, 255), levels),
        "brightness": blend(jnp.zeros((1, 1, 1)), levels, values),
        "contrast": blend(mean_grey(images)[:, None, None], levels, values),
    }
    is_asked = jnp.stack([operations == INDEX[name] for name in tables])
    changes = jnp.stack(
        [table - jnp.broadcast_to(levels, counts.shape) for table in tables.values()]
    )
    # A product, exact even of bfloat16, because XLA does not fuse it into `look_up`, which would
    # compute the table once more for every pixel.
    change = jnp.einsum("ob,obcl->bcl", is_asked.astype(jnp.float32), changes.astype(jnp.float32))
    return (levels + change.astype(jnp.int32)).astype(jnp.uint8)


def histograms(images: jax.Array) -> jax.Array:
    """Counts the pixels of each level, int32 (B, 3, 256)."""
    zeros = jnp.zeros(3 * 256, jnp.int32)
    count = jax.vmap(lambda levels: zeros.at[levels].add(1, mode="promise_in_bounds"))
    return count(_flat_levels(images)).reshape(-1, 3, 256)


def _flat_levels(images: jax.Array) -> jax.Array:
    """Where each level is among the 3 x 256 of all channels, int32 (B, H W 3)."""
    levels = images.astype(jnp.int32) + 256 * jnp.arange(3)[None, None, None]
    return levels.reshape(images.shape[0], -1)


def _stretched(counts: jax.Array) -> jax.Array:
    """Tables that stretch each channel to all levels; exact, where Pillow's may be 1 lower."""
    low = jnp.argmax(counts > 0, axis=-1, keepdims=True)
    high = 255 - jnp.argmax(counts[..., ::-1] > 0, axis=-1, keepdims=True)
    levels = jnp.arange(256)[None, None]
    stretched = jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, levels)


def _equalized(counts: jax.Array) -> jax.Array:
    """Tables that spread each channel's pixels evenly over the levels, as far as levels can."""
    levels = jnp.arange(256)[None, None]
    last = jnp.max(jnp.where(counts > 0, levels, 0), axis=-1, keepdims=True)
    before = jnp.cumsum(counts, axis=-1) - counts  # pixels of lower levels
    step = jnp.sum(jnp.where(levels < last, counts, 0), axis=-1, keepdims=True) // 255
    spread = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, spread, levels)


def matrices(operations: jax.Array, values: jax.Array, height: int, width: int) -> jax.Array:
    """Returns where the pixels of each image come from, float32 (B, 2, 3), see `transform`.

    The identity for operations that move no pixels.
    """

    def value(name: str) -> jax.Array:
        return jnp.where(operations == INDEX[name], values, 0)

    radians = jnp.deg2rad(value("rotate"))
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    # Rotations leave the centre, (width / 2, height / 2), where it is.
    shift_x = value("translate_x") + (width - cos * width + sin * height) / 2
    shift_y = value("translate_y") + (height - sin * width - cos * height) / 2
    rows = [cos, value("shear_x") - sin, shift_x, value("shear_y") + sin, cos, shift_y]
    return jnp.stack(rows, axis=-1).reshape(-1, 2, 3)


def transform(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Takes the pixel at (x, y) from `matrix @ (x, y, 1)`, bilinearly, and `FILL` from outside.

    As Pillow's `Image.transform` with `AFFINE`: centres of pixels are at halves, and half a pixel
    around the outermost centres is inside.
    """
    height, width = images.shape[1:3]
    x, y = jnp.arange(width)[None] + 0.5, jnp.arange(height)[:, None] + 0.5

    def sample(image, matrix):
        from_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]  # (H, W)
        from_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
        is_inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        left, top = jnp.floor(from_x - 0.5), jnp.floor(from_y - 0.5)
        to_right, to_bottom = (from_x - 0.5 - left)[..., None], (from_y - 0.5 - top)[..., None]

        def pixel(right: int, below: int) -> jax.Array:
            column = jnp.clip(left.astype(jnp.int32) + right, 0, width - 1)
            row = jnp.clip(top.astype(jnp.int32) + below, 0, height - 1)
            return image.at[row, column].get(mode="promise_in_bounds").astype(jnp.float32)

        upper = pixel(0, 0) + (pixel(1, 0) - pixel(0, 0)) * to_right
        lower = pixel(0, 1) + (pixel(1, 1) - pixel(0, 1)) * to_right
        result = upper + (lower - upper) * to_bottom
        return jnp.where(is_inside[..., None], result, FILL).astype(jnp.uint8)

    return jax.vmap(sample)(images, matrices)
