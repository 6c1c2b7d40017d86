"""How images are prepared for a checkpoint's network, and the file that says so."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from vitcls.augment import prepare
from vitcls.data.images import RESAMPLING, resize_and_crop, squash, to_rgb
from vitcls.errors import UserError, unknown
from vitcls.pretrained.files.json_fields import JsonFields

_MAX_PIXELS = 8192  # longest side that a checkpoint can ask for
_RESAMPLE = {int(filter_): name for name, filter_ in RESAMPLING.items()}
_RESAMPLE_CODE = {name: code for code, name in _RESAMPLE.items()}

_HALF = (0.5,) * 3
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """The defaults of one of Hugging Face's processors, for fields that its file lacks."""

    size: int | tuple[int, int]  # the shorter side, or (height, width)
    resample: str = "bicubic"
    crop: tuple[int, int] | None = None  # (height, width) of the centre; None: the whole image
    mean: tuple[float, float, float] = _HALF
    std: tuple[float, float, float] = _HALF
    is_square: bool = False  # an integer `size` is both sides; else the shorter one


_SHORTER_SIDE = _Kind(size=224, crop=(224, 224), mean=_CLIP_MEAN, std=_CLIP_STD)
_KINDS: Mapping[str, _Kind] = {
    "BitImageProcessor": _SHORTER_SIDE,
    "CLIPImageProcessor": _SHORTER_SIDE,
    "ConvNextImageProcessor": _Kind(size=384),
    "DeiTImageProcessor": _Kind(size=(256, 256), crop=(224, 224), is_square=True),
    "SiglipImageProcessor": _Kind(size=(224, 224)),
    "ViTImageProcessor": _Kind(size=(224, 224), resample="bilinear", is_square=True),
}


@dataclasses.dataclass(frozen=True)
class Processor:
    """How pixels are prepared for a network. All fields are plain values, also for the device."""

    size: tuple[int, int]  # (height, width) that the network sees
    # None: squash to `size`. Else first the shorter side, or (height, width), then a central crop.
    resize: int | tuple[int, int] | None = None
    resample: str = "bilinear"  # a name in `images.RESAMPLING`
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255  # normalised = (pixels * rescale - mean) / std
    id2label: Mapping[int, str] = dataclasses.field(default_factory=dict)  # class names, in order

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the logits; empty without a head."""
        return tuple(self.id2label.values())

    def pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The host's part: crop and resize.

        Args:
          image: A PIL image, which becomes upright and RGB as `images.decode` makes a file; or
            uint8: grey (H, W) or (H, W, 1), RGB (H, W, 3), RGBA (H, W, 4).

        Returns:
          uint8 (height, width, 3).

        Raises:
          UserError: Another type or shape, or an image that `images.decode` refuses.
        """
        image = to_rgb(_as_pil(image))
        if self.resize is None:
            return squash(image, size=self.size, resample=self.resample)
        return resize_and_crop(image, resize=self.resize, crop=self.size, resample=self.resample)

    def __call__(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Images as `pixels` takes them -> float32 (B, height, width, 3), normalised."""
        # The rows of a single image would pass for grey images.
        if isinstance(images, Image.Image) or getattr(images, "ndim", 4) < 4:
            raise UserError(
                "The processor takes a list of images; put a single image into brackets."
            )
        pixels = np.stack([self.pixels(image) for image in images]).astype(np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels * np.float32(self.rescale) - mean) / std

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """The device's part: uint8 (B, height, width, 3) -> float32, normalised."""
        return prepare.normalise(pixels, rescale=self.rescale, mean=self.mean, std=self.std)

    def resized(self, size: tuple[int, int]) -> "Processor":
        """The same for another (height, width); the share that is cropped away stays."""
        resize = self.resize
        if isinstance(resize, int):
            resize = round(resize * min(size) / min(self.size))
        elif resize is not None:
            resize = tuple(
                round(side * new / old)
                for side, new, old in zip(resize, size, self.size, strict=True)
            )
        return dataclasses.replace(self, size=tuple(size), resize=resize)


def _as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    pixels = np.asarray(image)
    is_shaped = pixels.ndim >= 2 and pixels.shape[2:] in {(), (1,), (3,), (4,)}
    if pixels.dtype != np.uint8 or not is_shaped or not pixels.size:
        raise UserError(
            f"An image is {pixels.dtype} {pixels.shape}; give uint8 (H, W, 3) or a PIL image. "
            "Grey may be (H, W) or (H, W, 1), and RGB with alpha (H, W, 4)."
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def read(
    fields: JsonFields, *, id2label: Mapping[int, str], default: str = "ViTImageProcessor"
) -> Processor:
    """Reads the content of a `preprocessor_config.json`.

    Args:
      fields: The content.
      id2label: Class names, in order.
      default: The type of processor that a file without a type means.

    Raises:
      UserError: it asks for steps or values that are not supported.
    """
    name = _name(fields, default)
    kind = _KINDS[name]
    if not fields.boolean("do_resize", True):
        raise fields.error("do_resize", "true")
    if fields.boolean("do_pad", False):
        raise fields.error("do_pad", "false")
    sizes = _convnext_sizes if name == "ConvNextImageProcessor" else _sizes
    size, resize = sizes(fields, kind)
    scaled = fields.boolean("do_rescale", True)
    normalised = fields.boolean("do_normalize", True)
    std = fields.numbers("image_std", kind.std)
    if min(std) <= 0:
        raise fields.error("image_std", "positive")
    return Processor(
        size=size,
        resize=resize,
        resample=fields.choice("resample", _RESAMPLE_CODE[kind.resample], _RESAMPLE),
        mean=fields.numbers("image_mean", kind.mean) if normalised else (0.0,) * 3,
        std=std if normalised else (1.0,) * 3,
        rescale=fields.number("rescale_factor", 1 / 255) if scaled else 1.0,
        id2label=id2label,
    )


def _name(fields: JsonFields, default: str) -> str:
    """The type of processor: a name in `_KINDS`."""
    # Before 2022 processors were called feature extractors; Fast and Pil name implementations.
    former = fields.string("feature_extractor_type", default)
    name = fields.string("image_processor_type", former)
    base = name.removesuffix("Fast").removesuffix("Pil")
    base = base.replace("FeatureExtractor", "ImageProcessor")
    if base not in _KINDS:
        raise unknown("image processor", name, _KINDS)
    return base


def _sizes(fields: JsonFields, kind: _Kind) -> tuple[tuple[int, int], int | tuple[int, int] | None]:
    """`size` and `resize` of the `Processor`."""
    resize = _size(fields, "size", kind.size, is_square=kind.is_square)
    if fields.boolean("do_center_crop", kind.crop is not None):
        size = _size(fields, "crop_size", kind.crop, is_square=True)
        if not isinstance(size, tuple):
            raise fields.error("crop_size", "an integer, or height and width")
        return size, resize
    if isinstance(resize, int):
        raise fields.error("size", "height and width, where nothing is cropped")
    return resize, None


def _convnext_sizes(fields: JsonFields, kind: _Kind) -> tuple[tuple[int, int], int | None]:
    """`size` and `resize` of a ConvNextImageProcessor, which ResNet checkpoints also have.

    Its size is the side of a square. From 384 up images are squashed; below, the shorter side
    becomes size / crop_pct, cut to an integer, and the square is cropped from it.
    """
    if fields.boolean("do_center_crop", False):  # a second crop, which no checkpoint asks for
        raise fields.error("do_center_crop", "false")
    side = fields.any("size", kind.size)
    if isinstance(side, dict) and list(side) == ["shortest_edge"]:
        side = side["shortest_edge"]
    if type(side) is not int or not 1 <= side <= _MAX_PIXELS:
        raise fields.error("size", f"an integer or shortest_edge, up to {_MAX_PIXELS}")
    if side >= 384:
        return (side, side), None
    crop_pct = fields.number("crop_pct", 224 / 256)
    if not side / _MAX_PIXELS <= crop_pct <= 1:
        raise fields.error("crop_pct", f"from {side / _MAX_PIXELS} to 1")
    return (side, side), int(side / crop_pct)


def _size(
    fields: JsonFields, name: str, default: int | tuple[int, int] | None, *, is_square: bool
) -> int | tuple[int, int] | None:
    """(height, width), or only the shorter side if the file gives only that.

    Args:
      fields: The file.
      name: Name of the field.
      default: What an absent field means.
      is_square: Whether an integer, as in all files before 2022, means both sides; otherwise it
        means the shorter one.
    """
    value = fields.any(name)
    if value is None:
        return default
    if not isinstance(value, dict):
        value = {"height": value, "width": value} if is_square else {"shortest_edge": value}
    sides = {key: side for key, side in value.items() if side is not None}
    if all(type(side) is int and 1 <= side <= _MAX_PIXELS for side in sides.values()):
        if sides.keys() == {"height", "width"}:
            return sides["height"], sides["width"]
        if sides.keys() == {"shortest_edge"}:
            return sides["shortest_edge"]
    raise fields.error(name, f"height and width, or shortest_edge, up to {_MAX_PIXELS}")


def to_json(processor: Processor) -> dict[str, Any]:
    """The content of a `preprocessor_config.json` from which `read` makes the same processor.

    Its type is one that takes these steps also in older releases of `transformers`, where
    ViTImageProcessor does not crop.
    """
    resize, (height, width) = processor.resize, processor.size
    crop = {"height": height, "width": width}
    if resize is None:
        steps = {"image_processor_type": "ViTImageProcessor", "size": crop}
    elif isinstance(resize, int):
        steps = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": resize}}
    else:
        size = {"height": resize[0], "width": resize[1]}
        steps = {"image_processor_type": "DeiTImageProcessor", "size": size}
    if resize is not None:
        steps |= {"do_center_crop": True, "crop_size": crop}
    return steps | {
        "do_resize": True,
        "resample": _RESAMPLE_CODE[processor.resample],
        "do_rescale": True,
        "rescale_factor": processor.rescale,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }
