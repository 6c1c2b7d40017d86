"""Pillow's operations in the compiled step: on one image, or one operation per image of a batch.

B batch, H W pixels. Images are uint8 (H, W, 3) before and after every function, with results cut
off to whole numbers where Pillow cuts them off: they differ by one level at most, where float32
falls on the other side of a whole number.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

FILL = 128  # grey, for what comes from outside the image: timm's default
OPERATIONS = (  # in the order of their stages; and what the value of each means, if anything
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
# The operations that begin a stage of `apply`; the first stage is to do nothing.
_BEGINNINGS = tuple(INDEX[name] for name in ("autocontrast", "color", "sharpness", "rotate"))


def apply(image: jax.Array, operation: jax.Array, value: jax.Array) -> jax.Array:
    """Applies an operation, int32 () into `OPERATIONS`, with this value, float32 (), see there.

    There are few stages, not one branch per operation: unless images are taken one by one, XLA
    computes all branches for every image.
    """
    stages = (
        lambda: image,
        lambda: look_up(image, tables(image, operation, value)),
        lambda: blend(grey(image)[..., None], image, value),
        lambda: blend(smooth(image), image, value),
        lambda: transform(image, matrix(operation, value, *image.shape[:2])),
    )
    return jax.lax.switch(jnp.sum(operation >= jnp.array(_BEGINNINGS)), stages)


def apply_all(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Applies its operations, int32 (R, B), to each image (B, H, W, 3), one after the other."""

    def apply_rounds(image, operations, values):
        # A loop keeps XLA from fusing one round into the next: it would compute the first once
        # more for every pixel that the next one reads.
        def apply_round(image, one):
            return apply(image, *one), None

        return jax.lax.scan(apply_round, image, (operations, values))[0]

    return to_each(apply_rounds, images, operations.T, values.T)


def to_each(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Maps over the rows of arrays: all at once, but on CPU one after the other.

    There an image stays in the processor's cache, and `apply` computes only one stage.
    """
    return jax.lax.platform_dependent(
        arrays,
        cpu=lambda rows: jax.lax.map(lambda row: function(*row), rows),
        default=lambda rows: jax.vmap(function)(*rows),
    )


def jitter(image: jax.Array, factors: jax.Array) -> jax.Array:
    """Changes brightness, contrast and saturation, in this order, by factors float32 (3,)."""
    image = blend(jnp.zeros(()), image, factors[0])
    image = blend(mean_grey(image), image, factors[1])
    return blend(grey(image)[..., None], image, factors[2])


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
    """Rotates about the centre, counterclockwise."""
    return transform(image, matrix(INDEX["rotate"], degrees, *image.shape[:2]))


def blend(origin: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `origin + factor * (image - origin)`, clipped."""
    origin = origin.astype(jnp.float32)
    return jnp.clip(origin + factor * (image - origin), 0, 255).astype(jnp.uint8)


def grey(image: jax.Array) -> jax.Array:
    """Returns the luma, int32 (H, W), with Pillow's fixed-point weights."""
    red, green, blue = (image[..., channel].astype(jnp.int32) for channel in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def mean_grey(image: jax.Array) -> jax.Array:
    """Returns the mean luma, rounded, uint32 ()."""
    size = image.shape[0] * image.shape[1]
    return (2 * jnp.sum(grey(image), dtype=jnp.uint32) + size) // (2 * size)


def smooth(image: jax.Array) -> jax.Array:
    """The mean over 3 x 3 pixels, the middle one counting five times; the border as it is."""
    wide = image.astype(jnp.int32)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set(((2 * sums + 13) // 26).astype(jnp.uint8))


def look_up(image: jax.Array, tables: jax.Array) -> jax.Array:
    """Replaces each level by the entry of its channel's table, uint8 (3, 256)."""
    return tables.ravel().at[_flat_levels(image)].get(mode="promise_in_bounds")


def tables(image: jax.Array, operation: jax.Array, value: jax.Array) -> jax.Array:
    """Returns what an operation that sees each level by itself makes of the 256 levels.

    Args:
      image: uint8 (H, W, 3).
      operation: int32 ().
      value: float32 ().

    Returns:
      uint8 (3, 256).
    """
    levels = jnp.arange(256)
    counts = histograms(image)
    whole = value.astype(jnp.int32)
    tables = {
        "autocontrast": _stretched(counts),
        "equalize": _equalized(counts),
        "invert": 255 - levels,
        "posterize": levels & (256 - (256 >> whole)),
        "solarize": jnp.where(levels < value, levels, 255 - levels),
        "solarize_add": jnp.where(levels < 128, jnp.minimum(levels + whole, 255), levels),
        "brightness": blend(jnp.zeros(()), levels, value),
        "contrast": blend(mean_grey(image), levels, value),
    }
    is_asked = jnp.array([INDEX[name] for name in tables]) == operation
    found = jnp.stack([jnp.broadcast_to(table, counts.shape) for table in tables.values()])
    # A product, exact even of bfloat16, because XLA does not fuse it into `look_up`, which would
    # compute the table once more for every pixel.
    found = jnp.einsum("o,ocl->cl", is_asked.astype(jnp.float32), found.astype(jnp.float32))
    return found.astype(jnp.uint8)


def histograms(image: jax.Array) -> jax.Array:
    """Counts the pixels of each level, int32 (3, 256)."""
    counts = jnp.zeros(3 * 256, jnp.int32)
    return counts.at[_flat_levels(image)].add(1, mode="promise_in_bounds").reshape(3, 256)


def _flat_levels(image: jax.Array) -> jax.Array:
    """Where each level is among the 3 x 256 of all channels, int32 (H, W, 3)."""
    return image.astype(jnp.int32) + 256 * jnp.arange(3)[None, None]


def _stretched(counts: jax.Array) -> jax.Array:
    """Tables that stretch each channel to all levels; exact, where Pillow's may be 1 lower."""
    low = jnp.argmax(counts > 0, axis=-1, keepdims=True)
    high = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=-1, keepdims=True)
    levels = jnp.arange(256)[None]
    stretched = jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, levels)


def _equalized(counts: jax.Array) -> jax.Array:
    """Tables that spread each channel's pixels evenly over the levels, as far as levels can."""
    levels = jnp.arange(256)[None]
    last = jnp.max(jnp.where(counts > 0, levels, 0), axis=-1, keepdims=True)
    before = jnp.cumsum(counts, axis=-1) - counts  # pixels of lower levels
    step = jnp.sum(jnp.where(levels < last, counts, 0), axis=-1, keepdims=True) // 255
    spread = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, spread, levels)


def matrix(operation: jax.Array, value: jax.Array, height: int, width: int) -> jax.Array:
    """Returns where the pixels of an operation that moves them come from: see `transform`."""

    def value_of(name: str) -> jax.Array:
        return jnp.where(operation == INDEX[name], value, 0)

    radians = jnp.deg2rad(value_of("rotate"))
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    # Rotations leave the centre, (width / 2, height / 2), where it is.
    shift_x = value_of("translate_x") + (width - cos * width + sin * height) / 2
    shift_y = value_of("translate_y") + (height - sin * width - cos * height) / 2
    rows = [cos, value_of("shear_x") - sin, shift_x, value_of("shear_y") + sin, cos, shift_y]
    return jnp.stack(rows).reshape(2, 3)


def transform(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Takes the pixel at (x, y) from `matrix @ (x, y, 1)`, bilinearly, and `FILL` from outside.

    As Pillow's `Image.transform` with `AFFINE`: centres of pixels are at halves, and half a pixel
    around the outermost centres is inside. The matrix is float32 (2, 3).
    """
    height, width = image.shape[:2]
    x, y = jnp.arange(width)[None] + 0.5, jnp.arange(height)[:, None] + 0.5
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
