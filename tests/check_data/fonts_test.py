"""Names in any script: on contact sheets and in figures, with and without a font that has them."""

import io
import logging
import unicodedata

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageFont, features

from vitcls.check_data import fonts
from vitcls.check_data.contact_sheet import contact_sheet

CAT = "猫"


def sheet(caption: str) -> np.ndarray:
    return np.asarray(contact_sheet([(Image.new("RGB", (8, 8)), caption)], num_columns=1))


def triangle(width: int):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((width, 0))
    pen.lineTo((0, 700))
    pen.closePath()
    return pen.glyph()


@pytest.fixture
def font(tmp_path, monkeypatch):
    """The only installed font: it has one Chinese character, drawn as a triangle."""
    path = tmp_path / "made.ttf"
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": triangle(300), "cat": triangle(900)})
    builder.setupHorizontalMetrics({".notdef": (400, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    monkeypatch.setattr(fonts, "_installed", lambda: (path,))
    return path


@pytest.fixture
def warnings(caplog):
    fonts._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "vitcls"):
        yield caplog


@pytest.mark.parametrize("name", ["кошка", "قطة", "Häßlich", "γάτα", "a – b …", "ŵ"])
def test_letters_of_other_alphabets_are_drawn(name, warnings):
    font, lacking = fonts.load(name, 11)
    assert not lacking
    box = bytes(font.getmask(fonts._MISSING))
    assert all(bytes(font.getmask(c)) != box for c in fonts.visible_characters(name))
    assert (sheet(name) != sheet(fonts._MISSING * len(name))).any()
    assert not warnings.messages


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow cannot join letters here")
def test_arabic_letters_are_joined_from_right_to_left():
    font, _ = fonts.load("قطة", 20)
    apart = ImageFont.truetype(font.path, 20, layout_engine=ImageFont.Layout.BASIC)
    assert bytes(font.getmask("قطة")) != bytes(apart.getmask("قطة"))


def test_an_accent_of_its_own_is_drawn_as_one_letter():
    assert (sheet(unicodedata.normalize("NFD", "é")) == sheet("é")).all()
    assert (sheet("e") != sheet("é")).any()


def test_a_font_is_taken_for_the_characters_that_it_has(font, warnings):
    assert fonts.has(font, CAT) and not fonts.has(font, "犬")
    assert fonts.load(CAT, 11)[0].path == font
    assert fonts.files_for({CAT, "犬"}) == ([font], {"犬"})
    assert (sheet(CAT) != sheet("犬")).any()
    assert len(warnings.messages) == 1  # of the dog


def test_missing_characters_are_named_once_with_what_to_install(monkeypatch, warnings):
    monkeypatch.setattr(fonts, "_installed", lambda: ())
    tiles = [(Image.new("RGB", (8, 8)), name) for name in ("cat", CAT, "犬", "кот")]
    for _ in range(2):
        contact_sheet(tiles, num_columns=2)
    (message,) = warnings.messages
    assert "characters that no installed font has (кот犬猫): they are drawn as boxes" in message
    assert "apt-get install fonts-noto-cjk fonts-noto-core" in message


def test_fonts_that_cannot_be_read_and_placeholders_are_passed_over(tmp_path, monkeypatch):
    for name in ("cut.ttf", "LastResortHE-Regular.ttf", "readme.txt"):
        (tmp_path / name).write_bytes(b"cut")
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path),))
    found = fonts._installed.__wrapped__()
    assert {path.name for path in found if path.parent == tmp_path} == {"cut.ttf"}
    assert not [path for path in found if "LastResort" in path.name]
    assert not fonts.has(tmp_path / "cut.ttf", "a")


def test_figures_take_the_same_fonts(font, warnings):
    figures = pytest.importorskip("vitcls.analysis.figures")

    def draw(label: str) -> np.ndarray:
        png = figures.intervals_png([(label, [0.5], 0.5, 0.4, 0.6)], xlabel="accuracy")
        return np.asarray(Image.open(io.BytesIO(png)).convert("L"))

    cat = draw(CAT)
    assert not warnings.messages
    dog = draw("犬")
    assert cat.shape != dog.shape or (cat != dog).any()
    assert "(犬)" in warnings.messages[0]
    assert "Made" in figures.intervals("one", [(CAT, [], 0.5, 0.4, 0.6)], xlabel="accuracy")
