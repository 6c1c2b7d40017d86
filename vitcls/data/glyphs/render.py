"""One distorted glyph as an 8x8 image, made the way scikit-learn's digits were.

Those were scanned, brought to 32x32 black and white by NIST's form-reading programs, and counted
down to 8x8 cells of 0..16 ink pixels (E. Alpaydin, C. Kaynak, "Cascading classifiers", Kybernetika
34(4), 1998). NIST's programs normalise size, stroke width and slant (M. D. Garris et al., "NIST
form-based handprint recognition system", NISTIR 5469, 1994): in the train split of `digits` every
character fills all 32 rows and about 20 columns, and 24 to 39 % of the pixels are ink. The same
steps follow the distortion here, each with some play.

Frames: `p` is the frame of the bent glyph, y downwards; `q` the glyph's own (`outlines.Glyph`).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vitcls.data.glyphs.outlines import Glyph

SIZE = 32  # pixels of the black-and-white image
CELL = 4  # pixels per side of a counted cell
LEVELS = CELL * CELL  # ink pixels of a full cell
BOX = (32.0, 20.0)  # height and width to which a character is stretched, in pixels

NUM_WAVES = 4  # cosine waves per axis in a smooth random field
EXTENT = 1.7  # the bent glyph lies within [-EXTENT, EXTENT] in both axes
COARSE = 40  # samples per axis when its bounding box is measured
MAX_STRETCH = 2.5  # of width over height: a plain bar must not fill the box


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How strongly a glyph is bent. Standard deviations, unless it says otherwise."""

    rotation: float = 0.15  # radians
    shear: float = 0.2  # sideways per unit of height
    aspect: float = 0.2  # logarithm of width over height
    bend: float = 0.1  # displacement by the longest waves, in halves of the glyph's longer side
    pressure: float = 0.25  # change along the glyph of a stroke's half width, relative to it
    pen: float = 0.6  # share drawn with a pen along the middle line; the rest keeps the outline
    slant_left: float = 0.5  # up to this share of the slant is left in
    half_width: tuple[float, float] = (0.06, 0.14)  # range of the pen's, as the box is measured
    ink: tuple[float, float] = (0.24, 0.39)  # range of the share of ink pixels
    box: float = 1.5  # width of the box, pixels
    shift: float = 1.0  # sideways, pixels


HANDWRITING = Distortion()


def render(
    glyph: Glyph, rng: np.random.Generator, *, distortion: Distortion = HANDWRITING
) -> np.ndarray:
    """Draws a glyph with a random distortion.

    Args:
      glyph: The shape.
      rng: Source of every random choice.
      distortion: Strengths.

    Returns:
      uint8 (8, 8), white on black: ink pixels per cell, 0..16 brought to 0..255.
    """
    matrix = _random_matrix(rng, distortion)
    bend = _random_bend(rng, distortion)
    with_pen = rng.random() < distortion.pen
    half_width = rng.uniform(*distortion.half_width)

    def ink_field(p: np.ndarray) -> np.ndarray:
        """Ink is where this exceeds a level: positions (n, m, 2) -> float (n, m)."""
        shift_y, shift_x, pressure = _waves_at(bend, p)
        y, x = np.moveaxis(p @ matrix.T, -1, 0)
        q = (y + shift_y, x + shift_x)
        field = _sample(glyph.stroke if with_pen else glyph.outline, q, glyph.scale)
        return field + half_width * (pressure + with_pen)

    box = _find_box(ink_field)
    p = _pixel_positions(box, rng, distortion)
    field = ink_field(p)
    num_ink = round(rng.uniform(*distortion.ink) * SIZE * SIZE)
    level = np.partition(field, -num_ink, axis=None)[-num_ink]
    return count_cells(field >= level)


def count_cells(bitmap: np.ndarray) -> np.ndarray:
    """Counts the ink of every 4x4 cell: bool (32, 32) -> uint8 (8, 8) with 0..16 as 0..255."""
    cells = bitmap.reshape(SIZE // CELL, CELL, SIZE // CELL, CELL).sum((1, 3))
    return np.round(cells * (255 / LEVELS)).astype(np.uint8)


def _random_matrix(rng: np.random.Generator, distortion: Distortion) -> np.ndarray:
    """Rotation, shear and change of aspect: (2, 2), acting on (y, x)."""
    angle = rng.normal(0, distortion.rotation)
    shear = rng.normal(0, distortion.shear)
    aspect = np.exp(rng.normal(0, distortion.aspect) / 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return rotation @ np.array([[1, 0], [shear, 1]]) @ np.diag([aspect, 1 / aspect])


def _random_bend(rng: np.random.Generator, distortion: Distortion) -> np.ndarray:
    """Amplitudes (3, waves, waves) of three smooth fields: displacement in y and x, pressure."""
    order = np.hypot(*np.mgrid[:NUM_WAVES, :NUM_WAVES])
    strength = 1 / np.maximum(order, 1) ** 1.5
    strength[0, 0] = 0  # a constant would only move the glyph
    sizes = np.array([distortion.bend, distortion.bend, distortion.pressure])
    return rng.normal(size=(3, NUM_WAVES, NUM_WAVES)) * strength * sizes[:, None, None]


def _waves_at(amplitudes: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Values of smooth fields at positions p: (c, waves, waves), (n, m, 2) -> (c, n, m)."""
    angle = (p / EXTENT + 1) * (np.pi / 2)
    y, x = np.moveaxis(np.cos(angle[..., None] * np.arange(NUM_WAVES)), 2, 0)  # (n, m, waves)
    return ((y @ amplitudes[:, None]) * x).sum(-1)


def _sample(field: np.ndarray, q: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    """Bilinear samples of a glyph's field at q = (y, x); the border's value outside."""
    height, width = field.shape
    y = np.clip(q[0] * scale + (height - 1) / 2, 0, height - 1.001)
    x = np.clip(q[1] * scale + (width - 1) / 2, 0, width - 1.001)
    row, column = y.astype(np.int32), x.astype(np.int32)
    fy, fx = y - row, x - column
    corner = row * width + column
    flat = field.ravel()
    top = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    bottom = flat[corner + width] * (1 - fx) + flat[corner + width + 1] * fx
    return top * (1 - fy) + bottom * fy


@dataclasses.dataclass(frozen=True)
class _Box:
    """Bounding box of the ink in frame p, and its slant."""

    top: float
    bottom: float
    left: float
    right: float
    slant: float  # dx / dy of the line from the first ink pixel of the top row to the bottom row's


def _find_box(ink_field: Callable[[np.ndarray], np.ndarray]) -> _Box:
    step = 2 * EXTENT / COARSE
    centres = (np.arange(COARSE) + 0.5) * step - EXTENT
    ink = ink_field(np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1)) > 0
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    first_ink = centres[ink.argmax(1)]  # per row
    top, bottom = rows[[0, -1]]
    height = centres[bottom] - centres[top] + step
    return _Box(
        top=centres[top] - step / 2,
        bottom=centres[bottom] + step / 2,
        left=centres[columns[0]] - step / 2,
        right=centres[columns[-1]] + step / 2,
        slant=(first_ink[bottom] - first_ink[top]) / height,
    )


def _pixel_positions(box: _Box, rng: np.random.Generator, distortion: Distortion) -> np.ndarray:
    """Where the pixels of the 32x32 image lie in frame p: (32, 32, 2)."""
    height, width = BOX[0], BOX[1] + rng.normal(0, distortion.box)
    y_per_pixel = (box.bottom - box.top) / height
    x_per_pixel = max((box.right - box.left) / width, y_per_pixel / MAX_STRETCH)
    centre = SIZE / 2 + rng.normal(0, distortion.shift)
    slant = box.slant * (1 - rng.uniform(0, distortion.slant_left))
    pixels = np.arange(SIZE) + 0.5
    y_off_centre = (pixels[:, None] - SIZE / 2) * y_per_pixel
    x = (pixels - centre) * x_per_pixel + (box.left + box.right) / 2
    y = y_off_centre + (box.top + box.bottom) / 2
    return np.stack(np.broadcast_arrays(y, x + slant * y_off_centre), axis=-1)
