"""Finds fonts for names in any script, among those that the system and matplotlib have.

Pillow's own font has ASCII only. Without another font every other character is a box.
"""

import functools
import importlib.util
import logging
import os
import unicodedata
from pathlib import Path

from PIL import ImageFont

log = logging.getLogger("vitcls")

# Where Linux, macOS and Windows keep fonts.
_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
_SUFFIXES = (".ttf", ".otf", ".ttc")
# Styles that are harder to read at small sizes come last.
_STYLES = ("bold", "italic", "oblique", "condensed", "light", "thin", "black", "mono", "serif")
# These fonts claim all characters, and draw a box or nothing for each.
_PLACEHOLDERS = ("lastresort", "adobeblank")
_SIZE = 32  # pixels, at which drawings of characters are compared
_EAST_ASIAN = ("CJK", "HANGUL", "HIRAGANA", "KATAKANA", "BOPOMOFO")  # in Unicode's names
_NUM_LOGGED = 20  # characters
# No font has this code point: it is drawn as the missing glyph.
_MISSING = "\U0010ffff"


def load(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, set[str]]:
    """Returns the font that fits a text best, and the characters that it lacks."""
    if text.isascii():
        return ImageFont.load_default(size), set()
    wanted = visible_characters(text)
    best, lacking = None, wanted
    for path in _installed():
        missing = {character for character in wanted if not has(path, character)}
        if len(missing) < len(lacking):
            best, lacking = path, missing
        if not missing:
            break
    return ImageFont.truetype(best, size) if best else ImageFont.load_default(size), lacking


def files_for(characters: set[str]) -> tuple[list[Path], set[str]]:
    """Returns fonts that together have the characters, and the characters that no font has."""
    left, chosen = set(characters), []
    for path in _installed():
        if not left:
            break
        if found := {character for character in left if has(path, character)}:
            chosen.append(path)
            left -= found
    return chosen, left


def visible_characters(text: str) -> set[str]:
    """The characters that need a glyph: no spaces, control characters or combining marks."""
    return {c for c in text if c.isprintable() and not c.isspace() and not _is_mark(c)}


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def warn_missing(characters: set[str]) -> None:
    """Warns, once for the same characters, of those that no installed font has."""
    if characters:
        _warn("".join(sorted(characters)))


@functools.cache
def _warn(characters: str) -> None:
    east_asian = [c for c in characters if unicodedata.name(c, "").startswith(_EAST_ASIAN)]
    packages = ["fonts-noto-cjk"] * bool(east_asian)
    packages += ["fonts-noto-core"] * (len(east_asian) < len(characters))
    log.warning(
        "Some names have characters that no installed font has (%s%s): they are drawn as boxes. "
        "Install a font, such as `apt-get install %s` on Debian or Ubuntu, and run the command "
        "again.", characters[:_NUM_LOGGED], "..." * (len(characters) > _NUM_LOGGED),
        " ".join(packages),
    )  # fmt: skip


@functools.cache
def has(path: Path, character: str) -> bool:
    """Whether a font draws a character otherwise than a missing glyph."""
    font = _open(path)
    return font is not None and _drawing(font, character) != _drawing(font, _MISSING)


@functools.cache
def _open(path: Path) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(path, _SIZE)
    except OSError:  # damaged, or with pictures of a fixed size only
        return None


def _drawing(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@functools.cache
def _installed() -> tuple[Path, ...]:
    """All font files, those that are easy to read first."""
    folders = [Path(os.path.expanduser(folder)) for folder in _FOLDERS]
    # Matplotlib brings fonts along. Finding its folder does not import it.
    if found := importlib.util.find_spec("matplotlib"):
        folders.append(Path(found.origin).parent / "mpl-data/fonts/ttf")
    paths = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not path.stem.lower().startswith(_PLACEHOLDERS)
    ]
    return tuple(sorted(paths, key=_order))


def _order(path: Path) -> tuple[int, bool, str]:
    name = path.stem.lower()
    return sum(style in name for style in _STYLES), "sans" not in name, str(path)
