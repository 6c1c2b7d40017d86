"""Host-side pixels: encoded bytes to RGB images, and crops and resizes to uint8 arrays.

Shared by the data loader and by the processor that travels with a checkpoint, so that training,
evaluation and prediction see the same pixels. Shapes: `H W` pixels; sizes are always
(height, width), although Pillow's are (width, height). Returned arrays may be read-only.

Training transforms have the form `f(image, rng, **kwargs)`, evaluation transforms `f(image,
**kwargs)`; bind the keywords with `functools.partial`, which worker processes can unpickle. All
randomness goes into a crop box in relative coordinates, a pure function of the generator and the
image's shape: the same box applies to a smaller copy of the image.
"""

import contextlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitcls.data.image_metadata import turn, without_metadata
from vitcls.errors import UserError

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

try:  # an optional package
    import pillow_heif

    pillow_heif.register_heif_opener()
    HAS_HEIF = True
except ImportError:
    HAS_HEIF = False
# Formats whose pixels Pillow cannot read, or only by running a program.
WITHOUT_PIXELS = frozenset(("BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS", "IPTC"))
HEIF_ADVICE = "pip install -r requirements-heif.txt"
_HEIF = re.compile(rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)

MAX_PIXELS = "VITCLS_MAX_PIXELS"  # environment variable, which worker processes inherit

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the sides

# 16-bit grey with this many bits or fewer is nearly black; the key marks it in Pillow's `info`.
_DIM_BITS = 12
_IS_DIM = "vitcls: is dim"

# Attempts to fit a random area and aspect ratio into the image before a central crop is taken.
# All are sampled at once, so that every crop consumes the same count of random numbers.
_NUM_ATTEMPTS = 10


class ImageError(UserError):
    """The bytes are not an image that can be decoded in full."""


def decode(data: bytes) -> Image.Image:
    """Decodes an image file, upright (orientation of EXIF or XMP applied) and in mode RGB.

    Metadata may be damaged or large. The orientation counts as far as it can be read.

    Transparency is laid over white and CMYK is converted without a colour profile, both as in
    `transformers.image_transforms.convert_to_rgb`. 16-bit grey keeps its high byte, as Pillow
    does with 16-bit colour.

    Raises:
      ImageError: Not an image, truncated or corrupt, more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`, or floating-point pixels.
    """
    return _read(data, to_rgb)


def stored(data: bytes) -> Image.Image:
    """Opens an image file without decoding it, for its stored size, mode and format.

    Raises:
      ImageError: Its header cannot be read.
    """
    return _read(data, lambda image: image)


def _read(data: bytes, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Applies `use` to the image in a file or, if that fails, to its pixels without metadata."""
    if not data:
        raise ImageError("The file is empty.")
    try:
        with _image_errors():
            return use(_open(data))
    except ImageError as error:
        # Pillow also refuses damaged metadata, such as a date, on which no pixel depends.
        pixels, info = without_metadata(data)
        try:
            with _image_errors():
                image = _open(pixels)
                image.info |= info
                return use(image)
        except ImageError:
            if is_heif(data) and isinstance(error.__cause__, UnidentifiedImageError):
                error = ImageError(f"HEIC needs a package: {HEIF_ADVICE}.")
            raise error from error.__cause__  # the error of the original file


def _open(data: bytes) -> Image.Image:
    Image.init()
    formats = [kind for kind in Image.ID if kind not in WITHOUT_PIXELS]
    return Image.open(io.BytesIO(data), formats=formats)


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # above twice the limit
        raise ImageError(f"The image is too large. {error} {_larger_advice()}") from error
    except UnidentifiedImageError as error:  # its text has an address in memory
        raise ImageError("Not a readable image: cannot identify its format.") from error
    except Exception as error:  # damaged files raise nearly any type from Pillow's plug-ins
        raise ImageError(f"Not a readable image: {error}.") from error


def is_heif(first_bytes: bytes) -> bool:
    """Whether a file that begins so is in the format of Apple's photographs."""
    return bool(_HEIF.match(first_bytes))


def _check_num_pixels(size: tuple[int, int]) -> None:
    # Pillow only warns up to twice its limit. Turning its warning into an error would need
    # `warnings.catch_warnings`, which is not thread-safe.
    limit = Image.MAX_IMAGE_PIXELS
    height, width = size
    if limit is not None and width * height > limit:
        raise ImageError(
            f"The image has, or would have to be enlarged to, {width} x {height} pixels, more than "
            f"the {limit} that are decoded. {_larger_advice()}"
        )


def _larger_advice() -> str:
    return f"Scale it down or cut it, or allow more: set {MAX_PIXELS} in the environment."


def _allow_pixels(text: str) -> None:
    """Sets Pillow's limit, which protects against files that decode to all of the memory."""
    if not text.isdecimal() or not int(text):
        raise UserError(
            f"{MAX_PIXELS}={text!r} must be the largest number of pixels of an image, "
            "such as 200000000."
        )
    Image.MAX_IMAGE_PIXELS = int(text)


if MAX_PIXELS in os.environ:
    _allow_pixels(os.environ[MAX_PIXELS])


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image of Pillow's upright and in mode RGB, as `decode` does with a file.

    An image that is so already is returned as it is.

    Raises:
      ImageError: See `decode`.
    """
    with _image_errors():
        _check_num_pixels(image.size[::-1])
        image.load()  # only this finds truncated files; `Image.verify` does not
        # Pillow turns TIFF files itself, while it loads them.
        method = turn(image.info) if image.format != "TIFF" else None
        if method is not None:
            image = image.transpose(method)
            image.info = {key: image.info[key] for key in image.info.keys() & {"transparency"}}
        return _flatten(image)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("The image has floating-point pixels; save it with 8 bits per channel.")
    if image.mode.startswith("I"):
        return _high_byte(image).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by alpha already
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey (`convert` would clip everything above 255 to white)."""
    pixels = np.asarray(image)
    largest = int(pixels.max())
    if pixels.min() < 0 or largest > 65535:
        raise ImageError("The image has pixels beyond 16 bits; save it with 8 bits per channel.")
    grey = Image.fromarray((pixels >> 8).astype(np.uint8))
    if 0 < largest < 2**_DIM_BITS:
        grey.info[_IS_DIM] = True
    return grey


def is_dim(image: Image.Image) -> bool:
    """Whether an image that was just decoded is 16-bit grey of which only 12 bits are used.

    Cameras and microscopes write such files. Their high byte is below 16, which is nearly black. A
    dark photograph of 16 bits may look the same, so the pixels stay what they are.
    """
    return _IS_DIM in image.info


def dim_advice(split_name: str, example: str) -> str:
    """The warning about an image of a split that `is_dim`."""
    return (
        f"Split {split_name!r}: {example} is nearly black: it is 16-bit grey, but all its values "
        f"are below {2**_DIM_BITS} of {2**16}. If it has {_DIM_BITS} bits per pixel, multiply them "
        f"by {2 ** (16 - _DIM_BITS)} and save the file again."
    )


def squash(image: Image.Image, *, size: tuple[int, int], resample: str) -> np.ndarray:
    """Resizes to `size`, ignoring the aspect ratio. Returns uint8 (H, W, 3).

    Args:
      image: RGB.
      size: Height and width of the result.
      resample: A name in `RESAMPLING`.
    """
    height, width = size
    return np.asarray(image.resize((width, height), RESAMPLING[resample]))


def resize_and_crop(
    image: Image.Image,
    *,
    resize: int | tuple[int, int],
    crop: tuple[int, int],
    resample: str,
) -> np.ndarray:
    """Resizes, then takes the central `crop`, padded with black where the image is smaller.

    Rounds as the Pillow backend of `transformers`' image processors does: the longer side is cut
    off, not rounded; a crop's odd pixel goes to the end of an image, a pad's to the start.

    Args:
      image: RGB.
      resize: The new shorter side (the aspect ratio is kept), or the new (height, width).
      crop: Height and width of the result.
      resample: A name in `RESAMPLING`.

    Returns:
      uint8 (H, W, 3).
    """
    size = resize
    if isinstance(resize, int):
        size = _fit_shorter_side(image, resize)
        _check_num_pixels(size)  # a line of pixels, enlarged, can take all memory
    return _center_crop(squash(image, size=size, resample=resample), crop)


def _fit_shorter_side(image: Image.Image, shorter: int) -> tuple[int, int]:
    if image.width <= image.height:
        return int(shorter * image.height / image.width), shorter
    return shorter, int(shorter * image.width / image.height)


def _center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Central (height, width) of pixels (H, W, 3)."""
    missing = [max(0, new - old) for new, old in zip(size, pixels.shape[:2], strict=True)]
    if any(missing):
        before_after = [((count + 1) // 2, count // 2) for count in missing]
        pixels = np.pad(pixels, [*before_after, (0, 0)])
    top, left = ((old - new) // 2 for new, old in zip(size, pixels.shape[:2], strict=True))
    return pixels[top : top + size[0], left : left + size[1]]


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    resample: str,
) -> np.ndarray:
    """The "Inception" crop: a box of random area and aspect ratio, resized to `size`.

    The box keeps its fractions of pixels: it is resized straight from the original, once.

    Args:
      image: RGB.
      rng: The sample's own generator.
      size: Height and width of the result.
      scale: Smallest and largest area of the box, as fractions of the image's.
      ratio: Smallest and largest width / height of the box.
      resample: A name in `RESAMPLING`.

    Returns:
      uint8 (H, W, 3).
    """
    box = random_box(rng, aspect=image.width / image.height, scale=scale, ratio=ratio)
    return _resize_box(image, box, size, resample)


def random_box(
    rng: np.random.Generator,
    *,
    aspect: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Samples a crop box: area uniform, aspect ratio log-uniform, position uniform.

    Areas and aspect ratios are sampled again until they fit. After ten that do not, the box is the
    largest central one with an allowed aspect ratio. Szegedy et al. 2015 (arXiv:1409.4842),
    section 6, with torchvision's rules for what does not fit.

    Args:
      rng: Always advanced by the same count of numbers.
      aspect: The image's width / height.
      scale: Smallest and largest area, as fractions of the image's.
      ratio: Smallest and largest width / height, in pixels.
    """
    # Plain floats: for so few numbers ten times faster than arrays.
    x, y, *samples = rng.random(2 + 2 * _NUM_ATTEMPTS).tolist()
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_sample, ratio_sample in zip(samples[::2], samples[1::2], strict=True):
        area = scale[0] + area_sample * (scale[1] - scale[0])
        relative = math.exp(log_low + ratio_sample * (log_high - log_low)) / aspect
        width, height = math.sqrt(area * relative), math.sqrt(area / relative)
        if width <= 1 and height <= 1:
            return _place(width, height, x, y)
    allowed = min(max(aspect, ratio[0]), ratio[1]) / aspect
    return _place(min(1.0, allowed), min(1.0, 1 / allowed), 0.5, 0.5)


def resize_and_random_crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    resize: int,
    size: tuple[int, int],
    resample: str,
) -> np.ndarray:
    """Scales the shorter side to `resize` and crops `size` at a random place.

    Both happen in one step, from a box with fractions of pixels. The usual transform of small
    transfer tasks (Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3).

    Args:
      image: RGB.
      rng: The sample's own generator.
      resize: Shorter side before the crop, in pixels; neither side of `size` exceeds it.
      size: Height and width of the result.
      resample: A name in `RESAMPLING`.

    Returns:
      uint8 (H, W, 3).
    """
    if max(size) > resize:
        raise UserError(
            f"A crop of {size[0]} x {size[1]} does not fit into images resized to a shorter side "
            f"of {resize}; resize to {max(size)} or more."
        )
    shorter = min(image.size)
    width = size[1] / resize * shorter / image.width
    height = size[0] / resize * shorter / image.height
    return _resize_box(image, _place(width, height, *rng.random(2)), size, resample)


def _place(width: float, height: float, x: float, y: float) -> Box:
    """A box of relative width and height at the fraction (x, y) of the room that is left."""
    left, top = x * (1 - width), y * (1 - height)
    return left, top, min(left + width, 1.0), min(top + height, 1.0)


def _resize_box(image: Image.Image, box: Box, size: tuple[int, int], resample: str) -> np.ndarray:
    """Resizes the part of the image in `box` to `size`. Returns uint8 (H, W, 3)."""
    left, top, right, bottom = box
    pixels = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    height, width = size
    return np.asarray(image.resize((width, height), RESAMPLING[resample], box=pixels))
