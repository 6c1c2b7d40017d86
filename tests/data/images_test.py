import functools
import io
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import ViTImageProcessorPil
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from vitcls.data import images
from vitcls.errors import UserError

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
GREY16 = np.linspace(0, 65535, 24 * 16).astype(np.uint16).reshape(24, 16)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reference_pixels(image: Image.Image, **options) -> np.ndarray:
    """What transformers' Pillow backend makes of an image before it rescales: uint8 (H, W, 3)."""
    processor = ViTImageProcessorPil(do_rescale=False, do_normalize=False, **options)
    return processor(image)["pixel_values"][0].transpose(1, 2, 0)


# --- decode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
def test_decode_converts_png_modes_like_transformers(mode):
    noise = np.random.default_rng(1).integers(0, 256, (9, 7, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA").convert(mode)
    data = encode(image, "TIFF" if mode == "PA" else "PNG")
    decoded = images.decode(data)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(
        np.asarray(decoded), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    )


def test_decode_lays_a_transparent_palette_entry_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    decoded = images.decode(encode(image, transparency=0))
    assert np.asarray(decoded).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_decode_converts_cmyk_jpeg():
    data = encode(RGB.convert("CMYK"), "JPEG")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(expected))


@pytest.mark.parametrize(
    ("format", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)]
)
def test_decode_scales_sixteen_bits_to_eight(format, dtype):
    decoded = np.asarray(images.decode(encode(Image.fromarray(GREY16.astype(dtype)), format)))
    np.testing.assert_array_equal(decoded, np.repeat(GREY16[..., np.newaxis] >> 8, 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_twelve_bits_in_sixteen_keep_their_pixels_and_are_known(format):
    for shift, is_dim in ((4, True), (3, False), (16, False)):  # the last one is all black
        grey = GREY16 >> shift
        image = images.decode(encode(Image.fromarray(grey), format))
        np.testing.assert_array_equal(np.asarray(image)[..., 0], grey >> 8)
        assert images.is_dim(image) == is_dim
    assert not images.is_dim(images.decode(encode(Image.new("L", (4, 4), 3))))
    assert images.dim_advice("train", "a/1.png") == (
        "Split 'train': a/1.png is nearly black: it is 16-bit grey, but all its values are below "
        "4096 of 65536. If it has 12 bits per pixel, multiply them by 16 and save the file again."
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, "JPEG", exif=exif)
    expected = load_image(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(expected))
    if orientation == 6:
        upright = Image.open(io.BytesIO(encode(RGB, "JPEG"))).rotate(-90, expand=True)
        np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(upright))


def test_decode_rejects_empty_files():
    with pytest.raises(images.ImageError, match="The file is empty"):
        images.decode(b"")


def test_decode_rejects_what_is_not_an_image():
    with pytest.raises(images.ImageError, match="Not a readable image: cannot identify"):
        images.decode(b"<html></html>")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_decode_rejects_truncated_files(format, share):
    data = encode(RGB, format)
    with pytest.raises(images.ImageError, match="Not a readable image"):
        images.decode(data[: int(len(data) * share)])


def test_decode_rejects_decompression_bombs_by_their_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 - 1)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(images.ImageError, match="60 x 40 pixels, more than the 2399"),
    ):
        images.decode(encode(RGB))


def test_larger_images_can_be_allowed(monkeypatch):
    for limit in (40 * 60 - 1, 40 * 60 // 2 - 1):  # Pillow warns of the first, refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(images.ImageError, match="or allow more: set VITCLS_MAX_PIXELS in the"),
        ):
            images.decode(encode(RGB))
    images._allow_pixels("2400")
    assert images.decode(encode(RGB)).size == RGB.size
    for text in ("many", "0", "-1", ""):
        with pytest.raises(UserError, match=f"VITCLS_MAX_PIXELS='{text}' must be the largest"):
            images._allow_pixels(text)


def test_the_environment_allows_larger_images():
    def run(value):
        return subprocess.run(
            [sys.executable, "-m", "vitcls.predict", "--checkpoint=x", "--images=y", "--output=-"],
            capture_output=True, text=True, env=os.environ | {images.MAX_PIXELS: value},
        )  # fmt: skip

    result = run("many")
    assert result.returncode == 2
    assert result.stderr.startswith("ERROR: VITCLS_MAX_PIXELS='many' must be the largest number")
    code = "from PIL import Image; import vitcls.data.images; print(Image.MAX_IMAGE_PIXELS)"
    environment = os.environ | {images.MAX_PIXELS: "7"}
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert found == "7\n"


def test_a_line_of_pixels_is_not_enlarged_beyond_what_is_decoded():
    line = Image.new("RGB", (3000, 1))
    with pytest.raises(images.ImageError, match="enlarged to, 768000 x 256 pixels, more than the"):
        images.resize_and_crop(line, resize=256, crop=(224, 224), resample="bilinear")


def test_decode_rejects_floating_point_pixels():
    image = Image.fromarray(np.zeros((2, 2), np.float32))
    with pytest.raises(images.ImageError, match="floating-point pixels; save it with 8 bits"):
        images.decode(encode(image, "TIFF"))


def test_decode_rejects_more_than_sixteen_bits():
    image = Image.fromarray(np.full((2, 2), 1 << 20, np.int32))
    with pytest.raises(images.ImageError, match="beyond 16 bits"):
        images.decode(encode(image, "TIFF"))


# --- evaluation transforms ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resample", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
)
@pytest.mark.parametrize("size", [(16, 16), (31, 90), (8, 120)])
def test_squash_equals_transformers(resample, size):
    expected = reference_pixels(
        RGB,
        size={"height": size[0], "width": size[1]},
        resample=images.RESAMPLING[resample],
    )
    np.testing.assert_array_equal(images.squash(RGB, size=size, resample=resample), expected)


# Odd and even differences, wide and tall, images smaller than the crop in one side and in both.
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("image_size", [(40, 60), (61, 37), (33, 33), (5, 64), (301, 299)])
@pytest.mark.parametrize(
    ("resize", "crop"), [(32, (28, 28)), (33, (28, 27)), (20, (28, 27)), ((30, 25), (21, 28))]
)
def test_resize_and_crop_equals_transformers(resample, image_size, resize, crop):
    noise = np.random.default_rng(2).integers(0, 256, (*image_size, 3), np.uint8)
    image = Image.fromarray(noise)
    size = (
        {"shortest_edge": resize}
        if isinstance(resize, int)
        else dict(zip(("height", "width"), resize, strict=True))
    )
    expected = reference_pixels(
        image,
        size=size,
        do_center_crop=True,
        crop_size={"height": crop[0], "width": crop[1]},
        resample=images.RESAMPLING[resample],
    )
    pixels = images.resize_and_crop(image, resize=resize, crop=crop, resample=resample)
    assert pixels.shape == (*crop, 3)
    np.testing.assert_array_equal(pixels, expected)


# --- random crops ---------------------------------------------------------------------------------

INCEPTION = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


@pytest.mark.parametrize("aspect", [0.1, 0.7, 1.0, 1.9, 12.0])
def test_random_boxes_lie_inside_with_area_and_aspect_in_range(aspect):
    rng = np.random.default_rng(3)
    boxes = np.array([images.random_box(rng, aspect=aspect, **INCEPTION) for _ in range(500)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    ratios = width * aspect / height
    assert ratios.min() >= 0.75 - 1e-6
    assert ratios.max() <= 4 / 3 + 1e-6
    areas = width * height
    assert areas.max() <= 1 + 1e-6
    # Only the central fallback of very long images may be smaller than the range allows.
    assert areas.min() >= min(0.08, 0.75 * min(aspect, 1 / aspect)) - 1e-6


def test_random_boxes_of_square_images_are_uniform_in_area_and_position():
    rng = np.random.default_rng(4)
    scale = (0.1, 0.6)  # all fit: nothing is redrawn
    boxes = [
        images.random_box(rng, aspect=1.0, scale=scale, ratio=(3 / 4, 4 / 3)) for _ in range(4000)
    ]
    left, top, right, bottom = np.array(boxes).T
    width, height = right - left, bottom - top
    for values, low, high in [
        (width * height, *scale),
        (left / (1 - width), 0, 1),
        (top / (1 - height), 0, 1),
        (np.log(width / height), np.log(3 / 4), np.log(4 / 3)),
    ]:
        quantiles = np.quantile((values - low) / (high - low), [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quantiles, [0.25, 0.5, 0.75], atol=0.03)


def test_random_boxes_that_never_fit_become_the_largest_central_one():
    box = images.random_box(
        np.random.default_rng(5), aspect=8.0, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)
    )
    np.testing.assert_allclose(box, (5 / 12, 0, 7 / 12, 1))  # 4 / 3 of the height wide


@pytest.mark.parametrize("aspect", [0.05, 1.0])
def test_random_boxes_always_take_the_same_number_of_draws(aspect):
    rng, other = np.random.default_rng(6), np.random.default_rng(6)
    images.random_box(rng, aspect=aspect, **INCEPTION)
    images.random_box(other, aspect=3.0, **INCEPTION)
    assert rng.random() == other.random()


def test_full_size_crop_is_a_plain_resize():
    cropped = images.random_resized_crop(
        RGB,
        np.random.default_rng(7),
        size=(20, 30),
        scale=(1.0, 1.0),
        ratio=(1.5, 1.5),
        resample="bicubic",
    )
    squashed = images.squash(RGB, size=(20, 30), resample="bicubic")
    assert np.abs(cropped.astype(int) - squashed).max() <= 1  # the ratio's rounding


def test_crop_resizes_what_is_in_the_box():
    ramp = np.repeat(np.tile(np.arange(256, dtype=np.uint8), (64, 1))[..., np.newaxis], 3, axis=2)
    seed, keywords = 8, {"scale": (0.2, 0.5), "ratio": (3 / 4, 4 / 3)}
    left, _, right, _ = images.random_box(np.random.default_rng(seed), aspect=4.0, **keywords)
    cropped = images.random_resized_crop(
        Image.fromarray(ramp),
        np.random.default_rng(seed),
        size=(16, 16),
        resample="bilinear",
        **keywords,
    )
    centers = 256 * (left + (right - left) * (np.arange(16) + 0.5) / 16) - 0.5
    np.testing.assert_allclose(cropped[8, 1:-1, 0], centers[1:-1], atol=1)


def test_resize_and_random_crop_keeps_scale_and_reaches_every_place():
    columns = np.tile(np.arange(120, dtype=np.uint8), (60, 1))
    image = Image.fromarray(np.repeat(columns[..., np.newaxis], 3, axis=2))
    starts = []
    for seed in range(200):
        pixels = images.resize_and_random_crop(
            image, np.random.default_rng(seed), resize=30, size=(24, 20), resample="bilinear"
        )
        assert pixels.shape == (24, 20, 3)
        # The shorter side, 60, becomes 30: neighbours are two original pixels apart.
        np.testing.assert_allclose(np.diff(pixels[12, 2:-2, 0].astype(int)), 2, atol=1)
        starts.append(int(pixels[12, 0, 0]))
    assert min(starts) < 6
    assert max(starts) > 120 - 2 * 20 - 6


def test_resize_and_random_crop_rejects_a_crop_that_does_not_fit():
    with pytest.raises(UserError, match="crop of 24 x 32 does not fit .* resize to 32 or more"):
        images.resize_and_random_crop(
            RGB, np.random.default_rng(0), resize=30, size=(24, 32), resample="bilinear"
        )


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_tiny_images_can_be_cropped(size):
    image = Image.new("RGB", (size[1], size[0]), "red")
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pixels = images.random_resized_crop(
            image, rng, size=(8, 6), resample="bicubic", **INCEPTION
        )
        assert (pixels == (255, 0, 0)).all()


def test_bound_transforms_can_be_pickled_and_repeat():
    transform = functools.partial(
        images.random_resized_crop, size=(8, 8), resample="bilinear", **INCEPTION
    )
    copy = pickle.loads(pickle.dumps(transform))
    np.testing.assert_array_equal(
        transform(RGB, np.random.default_rng(9)), copy(RGB, np.random.default_rng(9))
    )


def test_exif_orientation_of_a_png_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 3
    decoded = images.decode(encode(RGB, exif=exif))
    expected = ImageOps.flip(ImageOps.mirror(RGB))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))
