"""What is known of every image, and which images are found to show the same."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vitcls.check_data import survey
from vitcls.data import images, sources


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(seed: int) -> Image.Image:
    """A smooth random picture with some grain, 96 x 64."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
    pixels = np.asarray(small.resize((96, 64), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


class Files(sources.Split):
    """Encoded images in memory, all of one class."""

    name, class_names, fingerprint = "train", ("a", "b"), "files"

    def __init__(self, *files: bytes):
        self._files = files

    def __len__(self):
        return len(self._files)

    def read(self, index):
        return self._files[index], 0

    def id(self, index):
        return str(index)

    def labels(self):
        return np.zeros(len(self), np.int32)


def look(*files: bytes) -> list[survey.Facts]:
    return survey.survey(Files(*files), num_threads=2)


def test_facts_are_those_of_the_stored_image():
    grey = Image.new("L", (5, 4), 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
    facts = look(
        encode(grey),
        encode(photo(0), "JPEG", exif=exif),
        encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encode(photo(0))[:2000],
        b"",
    )
    assert [(one.width, one.height) for one in facts[:3]] == [(5, 4), (64, 96), (6, 6)]
    assert [one.mode for one in facts[:3]] == ["L", "RGB", "P"]
    assert [one.format for one in facts[:3]] == ["PNG", "JPEG", "GIF"]
    assert [one.is_animated for one in facts] == [False, False, True, False, False]
    assert [bool(one.error) for one in facts] == [False, False, False, True, True]
    assert facts[4].error == "The file is empty."
    with pytest.raises(images.ImageError, match="Not a readable image"):
        images.decode(encode(photo(0))[:2000])


def test_a_jpeg_with_a_second_picture_is_not_animated():
    data = encode(photo(0), "MPO", save_all=True, append_images=[photo(1)])
    (facts,) = look(data)
    assert (facts.format, facts.error, facts.is_animated) == ("MPO", "", False)


def test_twelve_bits_in_sixteen_are_counted(caplog):
    grey = encode(Image.fromarray(np.arange(1024, 4096, dtype=np.uint16).reshape(48, 64)))
    facts = look(encode(photo(0)), grey, grey)
    assert [one.is_dim for one in facts] == [False, True, True]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("Split 'train': 1 is nearly black: it is 16-bit grey")
    assert message.endswith("Such images: 2 of 3.")


def test_facts_come_in_order():
    facts = look(*(encode(Image.new("L", (1 + number, 3))) for number in range(100)))
    assert [one.width for one in facts] == list(range(1, 101))


@pytest.mark.parametrize("seed", range(10))
def test_copies_are_found_and_different_images_are_not(seed):
    original = photo(seed)
    half, double = (
        original.resize((int(96 * scale), int(64 * scale)), Image.Resampling.LANCZOS)
        for scale in (0.5, 2)
    )
    files = [encode(photo(100 + number)) for number in range(8)]
    files[2:2] = [encode(original), encode(original, "BMP"), encode(original, "JPEG", quality=60)]
    files += [encode(half), encode(double, "WEBP", quality=70)]
    facts = look(*files)
    assert survey.find_duplicates(facts) == [[2, 3, 4, 11, 12]]
    assert facts[2].digest == facts[3].digest != facts[4].digest


def test_plain_images_are_only_duplicates_of_the_same_plain_image():
    plain = [encode(Image.new("RGB", (8, 6), color)) for color in ("red", "lime", "red", "white")]
    facts = look(*plain, b"", b"")
    assert [one.hash for one in facts] == [0] * 6
    assert survey.find_duplicates(facts) == [[0, 2]]
    assert survey.find_duplicates([]) == []


def test_search_finds_the_pairs_that_comparing_all_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**63, 600).astype(np.uint64)
    for position in range(1, 600, 2):  # a neighbour with 1 to 6 other bits, some with other pixels
        bits = rng.choice(64, 1 + position % 6, replace=False)
        hashes[position] = hashes[position - 1] ^ sum(np.uint64(1) << np.uint64(b) for b in bits)
    hashes[rng.choice(600, 100)] = hashes[0]
    thumbnails = rng.choice([100, 104, 107], (600, 1)).astype(np.uint8) * np.ones(64, np.uint8)
    expected = {
        (one, other)
        for one, other in itertools.combinations(range(600), 2)
        if int(hashes[one] ^ hashes[other]).bit_count() <= 3
        and abs(int(thumbnails[one, 0]) - int(thumbnails[other, 0])) <= 5
    }
    found = {tuple(sorted(pair)) for pair in survey._near_pairs(hashes, thumbnails)}
    assert found == expected
    assert len(expected) > 1000


def test_a_gif_cut_after_its_first_frame_is_an_image():
    frames = [photo(seed).resize((12, 8)).quantize(16) for seed in range(3)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first = len(encode(frames[0], "GIF"))
    facts = look(*(data[:end] for end in range(first, len(data))))
    assert {(one.error, one.format, one.width) for one in facts} == {("", "GIF", 12)}
    assert facts[-1].is_animated


def test_facts_of_an_image_with_damaged_metadata_are_those_of_its_pixels():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "a" * 2_000_000, zip=True)
    (facts,) = look(encode(Image.new("LA", (5, 4)), pnginfo=texts))
    assert (facts.error, facts.mode, facts.format, facts.width) == ("", "LA", "PNG", 5)
