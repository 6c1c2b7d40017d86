"""From a font file to the shape of one glyph: distance to its outline and to its pen stroke.

A shape is kept as two distance fields instead of a bitmap, because strokes of any width are then
level sets of the fields, and fields can be sampled anywhere, however they are bent.

Letters: h, w height and width of a field in its own pixels.
"""

import dataclasses
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

FONT_SIZE = 80  # pixels per em: a capital is about 56 high, nearly twice the 32 of a drawn image
MARGIN = 24  # pixels around the glyph, so that thickened strokes stay inside the field
INK = 96  # grey level from which a pixel is ink; below 128, so that hairlines do not break

CROSSED_SEVEN = "7-"  # a seven with a bar, as most Europeans write it and hardly any font draws it


@dataclasses.dataclass(frozen=True, eq=False)
class Glyph:
    """The shape of one glyph; lengths are in halves of its longer side, so that it fits in [-1, 1].

    Attributes:
      outline: float16 (h, w), distance to the outline, positive inside.
      stroke: float16 (h, w), minus the distance to the middle line of the strokes: never positive.
      scale: Field pixels per unit length.
    """

    outline: np.ndarray
    stroke: np.ndarray
    scale: float


def read_glyph(font: pathlib.Path, character: str) -> Glyph | None:
    """The glyph of `character`, or None where the font has none.

    Args:
      font: A TrueType or OpenType file.
      character: One character, or `CROSSED_SEVEN`.
    """
    face = ImageFont.truetype(str(font), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    image = _draw(face, character[0])
    # U+FFFF is not a character: a font draws its "missing" box for it.
    if not image.any() or np.array_equal(image, _draw(face, "\uffff")):
        return None
    return make_glyph(_cross(image) if character == CROSSED_SEVEN else image)


def make_glyph(ink: np.ndarray) -> Glyph:
    """The shape of a bitmap: bool (h, w), cut to its ink."""
    scale = max(ink.shape) / 2
    ink = np.pad(ink, MARGIN)
    outline = ndimage.distance_transform_edt(ink) - ndimage.distance_transform_edt(~ink)
    stroke = -ndimage.distance_transform_edt(~middle_line(ink))
    return Glyph(
        outline=(outline / scale).astype(np.float16),
        stroke=(stroke / scale).astype(np.float16),
        scale=scale,
    )


def _draw(face: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Bitmap of a character, cut to its ink: bool (h, w)."""
    left, top, right, bottom = face.getbbox(character)
    image = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=face)
    ink = np.asarray(image) >= INK
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if rows.size == 0:
        return np.zeros((0, 0), bool)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _cross(seven: np.ndarray) -> np.ndarray:
    """Adds a bar at mid-height, three quarters of the width long and as thick as the stem."""
    height, width = seven.shape
    row = height * 11 // 20
    stem = np.flatnonzero(seven[row])
    reach, half_thickness = width * 3 // 8, max(stem.size // 3, 1)
    crossed = np.pad(seven, ((0, 0), (reach, reach)))  # the bar may stick out
    centre = int(stem.mean()) + reach
    bar = (slice(row - half_thickness, row + half_thickness), slice(centre - reach, centre + reach))
    crossed[bar] = True
    columns = np.flatnonzero(crossed.any(0))
    return crossed[:, columns[0] : columns[-1] + 1]


def _thinning_tables() -> tuple[np.ndarray, np.ndarray]:
    """Whether a pixel goes in the first and in the second half-step, by its 8 neighbours' code.

    Bit i of the code is neighbour i, clockwise from the one above (P2 ... P9 of Zhang and Suen).
    """
    neighbours = (np.arange(256)[:, None] >> np.arange(8)) & 1  # (256, 8)
    count = neighbours.sum(1)
    starts = ((neighbours == 0) & (np.roll(neighbours, -1, axis=1) == 1)).sum(1)
    up, right, down, left = neighbours[:, [0, 2, 4, 6]].T
    border = (count >= 2) & (count <= 6) & (starts == 1)
    first = border & (up * right * down == 0) & (right * down * left == 0)
    second = border & (up * right * left == 0) & (up * down * left == 0)
    return first, second


_THINNING_TABLES = _thinning_tables()
_CLOCKWISE = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


def middle_line(ink: np.ndarray) -> np.ndarray:
    """Thins strokes to lines one pixel wide.

    T. Y. Zhang, C. Y. Suen, "A fast parallel algorithm for thinning digital patterns", 1984.

    Args:
      ink: bool (h, w) with an empty border.

    Returns:
      bool (h, w), a subset of `ink`.
    """
    ink = ink.copy()
    changed = True
    while changed:
        changed = False
        for table in _THINNING_TABLES:
            code = np.zeros(ink.shape, np.uint8)
            for bit, (dy, dx) in enumerate(_CLOCKWISE):
                code |= np.roll(ink, (-dy, -dx), axis=(0, 1)).astype(np.uint8) << bit
            gone = ink & table[code]
            changed |= bool(gone.any())
            ink &= ~gone
    return ink
