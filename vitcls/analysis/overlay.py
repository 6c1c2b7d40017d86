"""Draws a map of where a network looks over the image."""

import math

import matplotlib
import numpy as np
from PIL import Image

_MIN_SIDE = 224  # pixels of the longer side
_SHARE = 0.6  # weight of the map's colours; the rest is the image in grey


def draw_map(pixels: np.ndarray, heat: np.ndarray) -> Image.Image:
    """Returns the map over the image as an RGB picture, whose longer side has 224 pixels or more.

    Args:
      pixels: uint8 (H, W, 3).
      heat: float32 (H, W), from 0, dark, to 1, bright.
    """
    height, width = heat.shape
    scale = math.ceil(_MIN_SIDE / max(height, width))
    size = (width * scale, height * scale)
    grey = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.NEAREST)
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
    colours = 255 * matplotlib.colormaps["inferno"](smooth)[..., :3]
    mixed = _SHARE * colours + (1 - _SHARE) * np.asarray(grey)[..., None]
    return Image.fromarray(mixed.round().astype(np.uint8))


def side_by_side(pixels: np.ndarray, drawn: Image.Image) -> Image.Image:
    """Returns the image, enlarged to the size of `drawn`, to the left of it."""
    image = Image.fromarray(pixels).resize(drawn.size, Image.Resampling.NEAREST)
    both = Image.new("RGB", (2 * drawn.width, drawn.height))
    both.paste(image, (0, 0))
    both.paste(drawn, (drawn.width, 0))
    return both
