"""Contact sheets: many small images with captions, in one picture."""

import unicodedata
from collections.abc import Iterable

from PIL import Image, ImageDraw

from vitcls.check_data import fonts

_MARGIN = 4
_FONT_SIZE = 11
_LINE_HEIGHT = 14


def contact_sheet(
    tiles: Iterable[tuple[Image.Image, str]], *, num_columns: int, tile_size: int = 96
) -> Image.Image:
    """Lays out tiles row by row.

    Args:
      tiles: RGB images and their captions, which are cut off at the width of the tile.
      num_columns: Tiles in a row.
      tile_size: Side of the square, in pixels, that each image is fitted into. Small images are
        enlarged without smoothing, so that their pixels can be seen.
    """
    tiles = list(tiles)
    num_lines = max((caption.count("\n") + 1 for _, caption in tiles), default=1)
    width, height = tile_size + _MARGIN, tile_size + num_lines * _LINE_HEIGHT + _MARGIN
    num_rows = -(-len(tiles) // num_columns)
    sheet = Image.new("RGB", (num_columns * width + _MARGIN, num_rows * height + _MARGIN), "white")
    lacking = set()
    for number, (image, caption) in enumerate(tiles):
        row, column = divmod(number, num_columns)
        left, top = _MARGIN + column * width, _MARGIN + row * height
        tile = _fit(image, tile_size)
        sheet.paste(tile, (left + (tile_size - tile.width) // 2, top))
        text = Image.new("RGB", (tile_size, num_lines * _LINE_HEIGHT), "white")
        # Composed: fonts have "é" rather than "e" and an accent of its own.
        caption = unicodedata.normalize("NFC", caption)
        font, missing = fonts.load(caption, _FONT_SIZE)
        lacking |= missing
        ImageDraw.Draw(text).multiline_text((0, 0), caption, "black", font, spacing=2)
        sheet.paste(text, (left, top + tile_size))
    fonts.warn_missing(lacking)
    return sheet


def _fit(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), resample)
