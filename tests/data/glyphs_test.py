"""Glyph shapes, their distortion, the classes and the font table; few tests need a font."""

import string

import numpy as np
import pytest

from vitcls.data.glyphs import fonts, glyphs, outlines, render
from vitcls.errors import UserError

DEJAVU = fonts.FONT_ROOT / "truetype" / "dejavu" / "DejaVuSans.ttf"
STRAIGHT = render.Distortion(
    rotation=0, shear=0, aspect=0, bend=0, pressure=0, slant_left=0, box=0, shift=0
)

with_dejavu = pytest.mark.skipif(not DEJAVU.exists(), reason="needs the Debian font DejaVu Sans")


def ring() -> np.ndarray:
    """An upright letter O as a bitmap."""
    y, x = np.mgrid[-1:1:60j, -1:1:40j]
    radius = np.hypot(y, x)
    return (radius <= 1) & (radius >= 0.7)


def bar() -> np.ndarray:
    return np.ones((60, 9), bool)


def test_middle_line_of_a_bar_is_one_pixel_wide_and_inside():
    ink = np.pad(bar(), 2)
    line = outlines.middle_line(ink)
    assert (line <= ink).all()
    assert (line[10:-10].sum(axis=1) == 1).all()


def test_middle_line_keeps_the_hole_of_a_ring():
    line = outlines.middle_line(np.pad(ring(), 2))
    centre = line[line.shape[0] // 2]
    assert centre.sum() == 2
    assert not centre[centre.size // 2]


def test_middle_line_leaves_its_argument_alone():
    ink = np.pad(bar(), 2)
    outlines.middle_line(ink)
    assert ink.sum() == bar().sum()


def test_outline_field_is_positive_inside_and_stroke_field_zero_on_the_line():
    glyph = outlines.make_glyph(bar())
    inside = np.pad(bar(), outlines.MARGIN)
    assert ((glyph.outline > 0) == inside).all()
    assert glyph.stroke.max() == 0
    assert (glyph.stroke[~inside] < 0).all()


def test_cells_count_ink_pixels():
    bitmap = np.zeros((32, 32), bool)
    bitmap[:4, 4:8] = True  # a full cell
    bitmap[5, :2] = True  # two pixels of another
    cells = render.count_cells(bitmap)
    assert cells.dtype == np.uint8
    assert cells[0, 1] == 255
    assert cells[1, 0] == 32  # 2 * 255 / 16, rounded
    assert np.count_nonzero(cells) == 2


def test_same_seed_draws_the_same_image():
    glyph = outlines.make_glyph(ring())
    first, second, other = (render.render(glyph, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize("bitmap", [ring(), bar()], ids=["ring", "bar"])
def test_ink_share_and_levels_are_those_of_the_digits(bitmap):
    glyph = outlines.make_glyph(bitmap)
    levels = np.round(np.arange(17) * (255 / 16))
    low, high = render.HANDWRITING.ink
    for seed in range(20):
        image = render.render(glyph, np.random.default_rng(seed))
        assert np.isin(image, levels).all()
        share = np.round(image * (16 / 255)).sum() / 1024
        assert low - 0.001 <= share <= high + 0.02  # pixels of equal distance come together


def test_a_character_fills_the_height_of_the_image():
    glyph = outlines.make_glyph(ring()[:, ::2])
    for seed in range(20):
        image = render.render(glyph, np.random.default_rng(seed))
        assert image[0].any()
        assert image[-1].any()


def test_without_distortion_a_ring_is_centred_and_symmetric():
    image = render.render(
        outlines.make_glyph(ring()), np.random.default_rng(0), distortion=STRAIGHT
    ).astype(int)
    assert np.abs(image - image[:, ::-1]).max() <= 32  # two of a cell's 16 pixels
    assert not image[:, [0, -1]].any()  # the box is 20 of 32 pixels wide
    assert (image[3:5, 3:5] == 0).all()


def test_slant_is_taken_out():
    slanted = np.zeros((60, 60), bool)
    for row in range(60):
        slanted[row, 50 - row * 2 // 3 : 58 - row * 2 // 3] = True
    image = render.render(
        outlines.make_glyph(slanted), np.random.default_rng(0), distortion=STRAIGHT
    )
    columns = np.arange(8)
    top, bottom = ((image[row] * columns).sum() / image[row].sum() for row in (1, -2))
    assert abs(top - bottom) < 1


def test_every_letter_and_digit_belongs_to_exactly_one_class():
    drawn = [character for characters in glyphs.CLASSES.values() for character in characters]
    assert sorted(drawn) == sorted([*string.ascii_letters, *string.digits, outlines.CROSSED_SEVEN])
    assert len(glyphs.CLASS_NAMES) == 46
    assert glyphs.CLASS_NAMES[:10] == tuple(string.digits)


def test_an_image_depends_on_seed_split_and_index_only():
    shapes = ((outlines.make_glyph(ring()),), (outlines.make_glyph(bar()),))
    image, label = glyphs.draw(shapes, 7, split="train")
    glyphs.draw(shapes, 8, split="train")
    again, _ = glyphs.draw(shapes, 7, split="train")
    np.testing.assert_array_equal(image, again)
    assert label == 1
    for other in (
        glyphs.draw(shapes, 9, split="train"),
        glyphs.draw(shapes, 7, split="test"),
        glyphs.draw(shapes, 7, split="train", seed=1),
    ):
        assert (other[0] != image).any()


def test_font_table_names_every_package_and_file_once():
    names = [package.name for package in fonts.PACKAGES]
    files = [file for package in fonts.PACKAGES for file in package.files]
    assert len(set(names)) == len(names)
    assert len(set(files)) == len(files)
    assert any(package.held_out for package in fonts.PACKAGES)


def test_fonts_are_found_in_any_folder_in_table_order(tmp_path):
    package = fonts.Package("fonts-two", fonts.OFL, ("b.ttf", "a.otf"))
    for path in (tmp_path / "x" / "a.otf", tmp_path / "y" / "z" / "b.ttf"):
        path.parent.mkdir(parents=True)
        path.touch()
    assert [p.name for p in fonts.locate((package,), tmp_path)[package]] == ["b.ttf", "a.otf"]


def test_missing_fonts_error_names_packages_and_command(tmp_path):
    there = fonts.Package("fonts-there", fonts.OFL, ("there.ttf",))
    missing = fonts.Package("fonts-missing", fonts.OFL, ("missing.ttf",))
    (tmp_path / "there.ttf").touch()
    with pytest.raises(UserError) as error:
        fonts.locate((there, missing), tmp_path)
    assert f"missing below {tmp_path}: fonts-missing. Install them with `make fonts`" in str(
        error.value
    )


def test_images_have_the_format_of_the_digits(tmp_path):
    features = glyphs.Glyphs(data_dir=str(tmp_path)).info.features
    assert features["image"].shape == (8, 8, 1)
    assert tuple(features["label"].names) == glyphs.CLASS_NAMES


@with_dejavu
def test_a_character_that_the_font_lacks_has_no_glyph():
    assert outlines.read_glyph(DEJAVU, "A") is not None
    assert outlines.read_glyph(DEJAVU, "\U0001f9a6") is None  # an otter
    assert outlines.read_glyph(DEJAVU, " ") is None


@with_dejavu
def test_a_crossed_seven_is_a_seven_with_more_ink():
    plain, crossed = (outlines.read_glyph(DEJAVU, c) for c in ("7", outlines.CROSSED_SEVEN))
    assert (crossed.outline > 0).sum() > (plain.outline > 0).sum() * 1.1


@with_dejavu
def test_characters_stay_distinct_after_drawing():
    """The images of one letter resemble each other more than those of another one."""
    means = {}
    for character in "AELTX":
        glyph = outlines.read_glyph(DEJAVU, character)
        images = [render.render(glyph, np.random.default_rng([i])) / 255 for i in range(40)]
        means[character] = np.mean(images[:20], axis=0), np.mean(images[20:], axis=0)
    for character, (first, second) in means.items():
        same = np.abs(first - second).mean()
        others = [np.abs(first - means[o][1]).mean() for o in means if o != character]
        assert same < min(others)
