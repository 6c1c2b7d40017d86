"""Every operation does to each pixel what Pillow does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vitcls.augment import pixels

HEIGHT, WIDTH = 31, 40


def make_images() -> np.ndarray:
    """Noise, smooth shades, dark and bright, flat and nearly flat: uint8 (8, H, W, 3)."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    shade = np.stack([x * 6, y * 8, (x + y) * 3], axis=-1) % 256
    two = np.where(noise > 128, [0, 255, 7], [255, 0, 9])
    spot = np.full_like(noise, 77)
    spot[3, 5] = (0, 200, 255)
    flat = [np.zeros_like(noise), np.full_like(noise, 255)]
    dark = 60 + noise // 8
    return np.stack([noise, shade, two, spot, *flat, dark, 255 - dark]).astype(np.uint8)


IMAGES = make_images()
# A value for each of pixels.OPERATIONS.
STRENGTHS = (0, 0, 0, 0, 3, 99, 40, 1.3, 0.7, 1.6, 0.4, 25, 0.2, -0.2, 5.5, -3)
# As on accelerators: all stages are computed for every image.
APPLY = jax.jit(jax.vmap(pixels.apply))


def matrix(*values: float):
    """Pillow's own resampling, with the fill colour that is ours."""
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, values, Image.Resampling.BILINEAR,
        fillcolor=(pixels.FILL,) * 3,
    )  # fmt: skip


def rotation(degrees: float):
    return lambda image: image.rotate(
        degrees, Image.Resampling.BILINEAR, fillcolor=(pixels.FILL,) * 3
    )


def added(value: int):
    return lambda image: image.point(
        [min(level + value, 255) if level < 128 else level for level in range(256)] * 3
    )


def enhanced(kind, factor: float):
    return lambda image: kind(image).enhance(factor)


FACTORS = (0.1, 0.19, 0.55, 1.0, 1.37, 1.81, 1.99)
CASES = (
    [("identity", 0, lambda image: image)]
    + [("autocontrast", 0, ImageOps.autocontrast), ("equalize", 0, ImageOps.equalize)]
    + [("invert", 0, ImageOps.invert)]
    + [
        ("posterize", bits, lambda image, bits=bits: ImageOps.posterize(image, bits))
        for bits in range(1, 9)
    ]
    + [
        ("solarize", value, lambda image, value=value: ImageOps.solarize(image, value))
        for value in (0, 26, 127.5, 128, 255, 256)
    ]
    + [("solarize_add", value, added(value)) for value in (0, 55, 110)]
    + [("brightness", factor, enhanced(ImageEnhance.Brightness, factor)) for factor in FACTORS]
    + [("contrast", factor, enhanced(ImageEnhance.Contrast, factor)) for factor in FACTORS]
    + [("color", factor, enhanced(ImageEnhance.Color, factor)) for factor in FACTORS]
    + [("sharpness", factor, enhanced(ImageEnhance.Sharpness, factor)) for factor in FACTORS]
    + [("rotate", degrees, rotation(degrees)) for degrees in (-135, -30, -7.3, 0, 12.5, 89, 134)]
    + [("shear_x", value, matrix(1, value, 0, 0, 1, 0)) for value in (-0.99, -0.27, 0.07, 0.3)]
    + [("shear_y", value, matrix(1, 0, 0, value, 1, 0)) for value in (-0.99, -0.27, 0.07, 0.3)]
    + [("translate_x", value, matrix(1, 0, value, 0, 1, 0)) for value in (-32, -5.3, 3, 17.9)]
    + [("translate_y", value, matrix(1, 0, 0, 0, 1, value)) for value in (-32, -5.3, 3, 17.9)]
)


def levels_apart(ours: jax.Array, theirs: list[Image.Image]) -> np.ndarray:
    return np.abs(np.asarray(ours, int) - np.stack([np.asarray(image, int) for image in theirs]))


def as_pillow(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


@pytest.mark.parametrize("name", pixels.OPERATIONS)
def test_every_operation_is_pillows(name):
    values = [(value, reference) for case, value, reference in CASES if case == name]
    for value, reference in values:
        operations = jnp.full(len(IMAGES), pixels.INDEX[name])
        ours = APPLY(IMAGES, operations, jnp.full(len(IMAGES), value, jnp.float32))
        apart = levels_apart(ours, [reference(image) for image in as_pillow(IMAGES)])
        print(name, value, apart.max(), np.mean(apart > 0))
        assert apart.max() <= 1, value
        # Where float32 and Pillow's arithmetic fall on two sides of a whole number.
        assert np.mean(apart > 0) < 0.02, value


def test_every_image_gets_its_own_operation():
    """Also one by one, as on CPU: apart from rounding, a level at a few pixels."""
    same_for_all = [
        APPLY(IMAGES, jnp.full(8, index), jnp.full(8, value, jnp.float32))[index % 8]
        for index, value in enumerate(STRENGTHS)
    ]
    for start in (0, 8):
        drawn = jnp.arange(start, start + 8), jnp.array(STRENGTHS[start : start + 8], jnp.float32)
        expected = np.stack(same_for_all[start : start + 8])
        np.testing.assert_array_equal(APPLY(IMAGES, *drawn), expected)
        one_by_one = jax.jit(pixels.apply_all)(IMAGES, *(x[None] for x in drawn))
        apart = np.abs(np.asarray(one_by_one, int) - expected)
        assert apart.max() <= 1 and np.mean(apart > 0) < 0.001


def test_operations_follow_one_another():
    operations = jnp.array([[pixels.INDEX["rotate"]] * 8, [pixels.INDEX["equalize"]] * 8])
    ours = jax.jit(pixels.apply_all)(IMAGES, operations, jnp.full((2, 8), 20.0))
    theirs = [ImageOps.equalize(rotation(20)(image)) for image in as_pillow(IMAGES[:2])]
    # Equalizing spreads the levels that rotating cut off otherwise.
    assert np.mean(levels_apart(ours[:2], theirs) > 0) < 0.01


def test_jitter_is_brightness_then_contrast_then_color():
    factors = np.random.default_rng(0).uniform(0.6, 1.4, (8, 3)).astype(np.float32)
    theirs = []
    for image, (brightness, contrast, color) in zip(as_pillow(IMAGES), factors, strict=True):
        image = ImageEnhance.Brightness(image).enhance(brightness)
        image = ImageEnhance.Contrast(image).enhance(contrast)
        theirs.append(ImageEnhance.Color(image).enhance(color))
    apart = levels_apart(jax.jit(jax.vmap(pixels.jitter))(IMAGES, factors), theirs)
    assert apart.max() <= 1
    assert np.mean(apart > 0) < 0.02


def test_rotation_is_pillows():
    theirs = [rotation(33.3)(image) for image in as_pillow(IMAGES)]
    ours = jax.jit(jax.vmap(pixels.rotate))(IMAGES, jnp.full(8, 33.3))
    assert levels_apart(ours, theirs).max() <= 1


def test_tiny_images_have_no_inner_pixels_to_smooth():
    for size in [(1, 1), (2, 5), (3, 3)]:
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        theirs = enhanced(ImageEnhance.Sharpness, 0.3)(Image.fromarray(image))
        ours = pixels.blend(pixels.smooth(jnp.asarray(image)), image, jnp.float32(0.3))
        assert levels_apart(ours[None], [theirs]).max() <= 1
