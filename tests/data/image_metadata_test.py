"""Damage to what is not pixels: the image stays, and its orientation where it can be read."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from vitcls.data import images
from vitcls.data.image_metadata import without_metadata

ORIENTATION = 0x0112
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"]
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def camera_exif(orientation: int) -> Image.Exif:
    """Texts, numbers, directories of their own, before and after the orientation."""
    exif = Image.Exif()
    exif[0x010E], exif[0x010F], exif[ORIENTATION] = "A picture of noise", "Maker", orientation
    exif[0x011A], exif[0x0131], exif[0x0132] = 72.0, "firmware 1.2", "2020:01:01 00:00:00"
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[0x829A], details[0x927C], details[0xA005] = 0.01, b"NOTE" * 9, {1: "R98"}
    exif.get_ifd(ExifTags.IFD.GPSInfo)[2] = (1.0, 2.0, 3.0)
    return exif


def encode(format: str, orientation: int, image: Image.Image = RGB) -> bytes:
    options = {"exif": camera_exif(orientation), "icc_profile": b"profile" * 9}
    if format == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("Comment", "hello " * 9)
        texts.add_text("Title", "noise " * 9, zip=True)
        texts.add_itxt("Author", "someone", zip=True)
        texts.add(b"gAMA", struct.pack(">L", 45455))
        options |= {"pnginfo": texts, "dpi": (72, 72)}
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def metadata_positions(format: str, data: bytes) -> list[int]:
    """Where the bytes of a file are that no pixel depends on, but for lengths."""
    found, at = [], 0
    if format == "JPEG":
        at = 2
        while data[at + 1] != 0xDA:
            (size,) = struct.unpack_from(">H", data, at + 2)
            if data[at + 1] in (0xE1, 0xE2):
                found += range(at + 4, at + 2 + size)
            at += 2 + size
    elif format == "PNG":
        at = 8
        while at < len(data):
            size, kind = struct.unpack_from(">L4s", data, at)
            if kind not in PNG_PIXELS:
                found += range(at + 8, at + 12 + size)
            at += 12 + size
    elif format == "WEBP":
        at = 12
        while at < len(data):
            kind, size = struct.unpack_from("<4sL", data, at)
            if kind in (b"EXIF", b"ICCP"):
                found += range(at + 8, at + 8 + size)
            at += 8 + size + size % 2
    elif format == "TIFF":
        (start,) = struct.unpack_from("<L", data, 4)
        for at in range(start + 2, start + 2 + 12 * data[start], 12):
            if struct.unpack_from("<H", data, at)[0] in (270, 271, 305, 306, 34665, 34675, 34853):
                found += range(at + 2, at + 12)
    elif format == "AVIF":
        found += range(data.index(b"MM\0*") - 10, data.index(b"NOTE"))
    return found


def turns(pixels: np.ndarray) -> list[bytes]:
    image = Image.fromarray(pixels)
    turned = [image, *(image.transpose(method) for method in Image.Transpose)]
    return [np.asarray(one).tobytes() for one in turned]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_random_damage_to_metadata_leaves_the_pixels(format):
    rng = np.random.default_rng(1)
    for orientation in (1, 6):
        data = encode(format, orientation)
        allowed = turns(np.asarray(images.decode(encode(format, 1))))
        positions = metadata_positions(format, data)
        for _ in range(150):
            damaged = bytearray(data)
            for position in rng.choice(positions, rng.integers(1, 4)):
                damaged[position] = rng.integers(256)
            assert np.asarray(images.decode(bytes(damaged))).tobytes() in allowed


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_can_be_read_counts_whatever_else_is_damaged(format):
    rng = np.random.default_rng(2)
    data = encode(format, 6)
    expected = np.asarray(images.decode(data))
    assert expected.shape == (9, 6, 3)
    # The entry of the orientation is the third of the first directory, in Intel's or Motorola's
    # order. All before it are headers, which lead there, and the two entries.
    order = next(order for order in (b"II*\0", b"MM\0*") if order in data)
    start = data.index(order)
    positions = [
        position
        for position in metadata_positions(format, data)
        if not start - 6 <= position < start + 10 + 3 * 12
    ]
    positions += range(start + 14, start + 22)  # offset and size of the first text
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.choice(positions, rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        np.testing.assert_array_equal(np.asarray(images.decode(bytes(damaged))), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_every_orientation_is_that_of_pillow(format):
    for orientation in range(1, 9):
        data = encode(format, orientation)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(np.asarray(images.decode(data)), expected)
        pixels, info = without_metadata(data)
        assert pixels != data
        assert b"firmware" not in pixels or format in ("TIFF", "AVIF")
        if format != "TIFF":  # nor does the file without the metadata lose it
            with Image.open(io.BytesIO(pixels)) as image:
                image.info |= info
                np.testing.assert_array_equal(np.asarray(images.to_rgb(image)), expected)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def png(*chunks: bytes, image: Image.Image = RGB, **options) -> bytes:
    """A PNG file with additional chunks after its header."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    data = file.getvalue()
    return data[:33] + b"".join(chunks) + data[33:]


XMP = b'<x:xmpmeta tiff:Orientation="6" />'
LARGE = zlib.compress(bytes(2_200_000))
BROKEN = {
    "large text": png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "large international text": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "large profile": png_chunk(b"iCCP", b"name\0\0" + LARGE),
    "profile of unknown method": png_chunk(b"iCCP", b"name\0\7" + LARGE),
    "short pHYs": png_chunk(b"pHYs", b"\0\0"),
    "short gAMA": png_chunk(b"gAMA", b"\0"),
    "short cHRM": png_chunk(b"cHRM", b"\0" * 9),
    "empty sRGB": png_chunk(b"sRGB", b""),
    "empty eXIf": png_chunk(b"eXIf", b""),
    "eXIf of nothing": png_chunk(b"eXIf", b"nothing"),
    "short animation": png_chunk(b"acTL", b"\0"),
    "frames out of order": png_chunk(b"fcTL", b"\7" * 26),
    "wrong checksum": png_chunk(b"tEXt", b"Comment\0hello")[:-1] + b"?",
    "damaged name": png_chunk(b"tEXt", b"Comment\0hello").replace(b"tEXt", b"t\xffXt"),
    "unknown": png_chunk(b"vcLs", b"hello"),
    "raw profile": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz"),
}


@pytest.mark.parametrize("chunk", BROKEN.values(), ids=BROKEN)
def test_a_png_is_its_pixels_whatever_its_other_chunks_say(chunk):
    np.testing.assert_array_equal(np.asarray(images.decode(png(chunk))), np.asarray(RGB))
    turned = png(chunk, png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP))
    expected = RGB.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(images.decode(turned)), np.asarray(expected))


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_orientation_in_a_text_of_imagemagick_counts(is_broken):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    content = exif.tobytes()
    text = f"\nexif\n{len(content):8}\n{content.hex()}" + ("?" if is_broken else "\n")
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Raw profile type exif", text, zip=True)
    expected = RGB.transpose(Image.Transpose.ROTATE_180)
    for extra in ([], [BROKEN["large text"]]):
        decoded = images.decode(png(*extra, pnginfo=texts))
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))


def test_an_animated_png_with_damaged_texts_is_its_first_frame():
    frames = [RGB, ImageOps.invert(RGB)]
    data = png(BROKEN["large text"], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(RGB))


def damage_chunk(data: bytes, kind: bytes, *, name: bytes | None = None, at: int = 0) -> bytes:
    damaged = bytearray(data)
    start = data.index(kind)
    if name is None:
        damaged[start + 4 + at] ^= 0x55
    else:
        damaged[start : start + 4] = name
    return bytes(damaged)


@pytest.mark.parametrize("extra", [[], [BROKEN["large text"]]], ids=["alone", "beside a text"])
@pytest.mark.parametrize("kind", [b"PLTE", b"tRNS", b"IDAT", b"IHDR"])
def test_damage_to_what_makes_pixels_is_an_error(kind, extra):
    image = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
    data = png(*extra, image=image, transparency=bytes(range(200)))
    assert images.decode(data).mode == "RGB"
    names = {b"PLTE": b"pLTE", b"tRNS": b"tRns", b"IDAT": b"iDAT", b"IHDR": b"iHDR"}
    with pytest.raises(images.ImageError, match="Not a readable image"):
        images.decode(damage_chunk(data, kind, name=names[kind]))
    with pytest.raises(images.ImageError, match="Not a readable image"):
        images.decode(damage_chunk(data, kind, at=4 if kind == b"IDAT" else 1))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_truncated_file_with_damaged_metadata_is_an_error(format):
    noise = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    data = encode(format, 6, Image.fromarray(noise)).replace(b"MM\0*", b"????")
    for share in (0.5, 0.8):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(images.ImageError, match="Not a readable image"),
        ):
            images.decode(data[: int(len(data) * share)])


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "segment",
    [
        jpeg_segment(0xE0, b"JFIF\0"),  # too short to say anything
        jpeg_segment(0xEE, b"Adobe"),
        jpeg_segment(0xE2, b"MPF\0"),
        jpeg_segment(0xE2, b"ICC_PROFILE\0"),
        jpeg_segment(0xED, b"Photoshop 3.0\x008BIM"),
        b"\xff" + jpeg_segment(0xFE, b"padding before it"),
    ],
)
def test_a_jpeg_is_its_pixels_whatever_its_other_segments_say(segment):
    data = encode("JPEG", 6)
    expected = np.asarray(images.decode(data))
    damaged = data[:2] + segment + data[2:]
    np.testing.assert_array_equal(np.asarray(images.decode(damaged)), expected)


def test_a_jpeg_in_cmyk_keeps_what_its_colours_mean():
    data = encode("JPEG", 6, RGB.convert("CMYK"))
    expected = np.asarray(images.decode(data))
    damaged = data[:2] + jpeg_segment(0xEE, b"Adobe") + data[2:]
    np.testing.assert_array_equal(np.asarray(images.decode(damaged)), expected)


def test_what_is_decoded_is_not_turned_again():
    for format in FORMATS:
        decoded = images.decode(encode(format, 6))
        np.testing.assert_array_equal(np.asarray(images.to_rgb(decoded)), np.asarray(decoded))
