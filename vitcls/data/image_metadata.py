"""Metadata of image files: reads the orientation and leaves out the rest.

Pillow refuses a file for a damaged date, comment or colour profile, although no pixel depends on
them. `without_metadata` makes a file with the same pixels and without these.
"""

import re
import struct
import zlib
from typing import Any

from PIL import Image

_ORIENTATION = 0x0112  # the tag in EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l"}  # types of EXIF values
_RAW_EXIF, _XMP = "Raw profile type exif", "XML:com.adobe.xmp"  # keywords of PNG texts

# Chunks of PNG, see its specification, section 11.3. "tRNS" is missing: it makes pixels. Without
# an animation's chunks the first frame remains.
_PNG_METADATA = {
    b"acTL", b"bKGD", b"cHRM", b"cICP", b"cLLI", b"eXIf", b"fcTL", b"fdAT", b"gAMA", b"hIST",
    b"iCCP", b"iTXt", b"mDCV", b"pHYs", b"sBIT", b"sPLT", b"sRGB", b"tEXt", b"tIME", b"zTXt",
}  # fmt: skip
# Chunks that make pixels are never left out, even with a damaged name.
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_WEBP_PIXELS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_MAX_TEXT = 2**24  # bytes of a decompressed text: a small file could fill the memory
# Names, dates, resolutions, profiles, and the directories of EXIF and GPS.
_TIFF_METADATA = {
    270, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316, 33432, 33723, 34377, 34665, 34675,
    34853, 40965,
}  # fmt: skip


def turn(info: dict[str, Any]) -> Image.Transpose | None:
    """How the pixels become upright, as `PIL.ImageOps.exif_transpose` decides; None: they are.

    Args:
      info: A Pillow image's `info`. Damaged entries after the orientation do not matter.
    """
    orientation = _exif_orientation(info.get("exif") or _raw_exif(info.get(_RAW_EXIF)))
    if orientation is None:
        xmp = info.get(_XMP) or info.get("xmp") or ""
        xmp = xmp.decode("latin-1") if isinstance(xmp, bytes) else str(xmp)
        match = re.search(r'tiff:Orientation(?:="|>)([0-9])', xmp)
        orientation = int(match[1]) if match else 1
    return _TURNS.get(orientation)


def _raw_exif(text: Any) -> bytes:
    """EXIF as ImageMagick writes it: three other lines, then hexadecimal digits."""
    digits = "".join(str(text).split("\n")[3:])
    return bytes.fromhex(re.match("(?:[0-9a-fA-F]{2})*", digits)[0])


def _exif_orientation(exif: bytes) -> int | None:
    """The value of the orientation tag, or None. Other tags may be damaged."""
    exif = re.sub(rb"^(Exif\0\0){1,2}", b"", exif)
    for tag, kind, at, order in _tags(exif):
        if tag == _ORIENTATION and kind in _INTEGERS:
            return struct.unpack_from(order + _INTEGERS[kind], exif, at + 8)[0]
    return None


def _tags(tiff: bytes) -> list[tuple[int, int, int, str]]:
    """Tag, type, position and byte order of each entry in TIFF's first directory."""
    tags = []
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    try:
        (start,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, _ = struct.unpack_from(f"{order}HHLL", tiff, at)
            tags.append((tag, kind, at, order))
    except struct.error:  # the file is cut
        pass
    return tags if order else []


def without_metadata(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Returns a file with the same pixels, and its orientation in the form that `turn` takes.

    Files of other formats come back unchanged.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data[4:8] == b"ftyp":  # AVIF and HEIC
        # The item is not called EXIF any more. It never says the orientation: `irot` and `imir` do.
        return re.sub(rb"(?s)(infe.{8}|infe.{10})Exif", rb"\1none", data, count=1), {"xmp": b""}
    if data.startswith((b"II*\0", b"MM\0*")):
        return _tiff(data), {}
    return data, {}


def _jpeg(data: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, at = [data[:2]], {}, 2
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker == b"\xff":  # padding
            at += 1
            continue
        if marker < b"\xc0" or b"\xd0" <= marker <= b"\xda" or len(data) < at + 4:
            break  # here the pixels start
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        body = data[at + 4 : end]
        if marker == b"\xe1" and body.startswith(b"Exif\0\0"):
            info["exif"] = info.get("exif", b"") + body[6:]
        elif marker == b"\xe1" and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            info["xmp"] = body
        # APP0 and APP14 say how the colours are stored. Decoders ignore those that are too short.
        is_metadata = marker == b"\xfe" or b"\xe0" <= marker <= b"\xef"
        if not is_metadata or len(body) >= {b"\xe0": 14, b"\xee": 12}.get(marker, len(data)):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]]), info


def _png(data: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, at = [data[:8]], {}, 8
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">L4s", data, at)
        body, end = data[at + 8 : at + 8 + size], at + 12 + size
        if kind in _PNG_PIXELS or not _is_png_metadata(kind, body, data[end - 4 : end]):
            kept.append(data[at:end])
        elif kind == b"eXIf":
            info["exif"] = body
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = body.partition(b"\0")
            if keyword.decode("latin-1") in (_RAW_EXIF, _XMP):
                info[keyword.decode("latin-1")] = _png_text(kind, rest).decode("latin-1")
        at = end
    return b"".join(kept), info


def _is_png_metadata(kind: bytes, body: bytes, crc: bytes) -> bool:
    """Whether a chunk surely does not make pixels, although its name may be damaged."""
    names = {kind, *_PNG_METADATA}
    return kind in _PNG_METADATA or crc in {
        struct.pack(">L", zlib.crc32(body, zlib.crc32(name))) for name in names
    }


def _png_text(kind: bytes, rest: bytes) -> bytes:
    """The text of a chunk, from the bytes after its keyword; empty if it is damaged."""
    is_compressed = kind == b"zTXt" or rest[:1] == b"\1"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":  # language and translated keyword come first
        rest = rest[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(rest, _MAX_TEXT) if is_compressed else rest
    except zlib.error:
        return b""


def _webp(data: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, at = [b"WEBP"], {}, 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sL", data, at)
        end = at + 8 + size + size % 2
        if kind in _WEBP_PIXELS:
            kept.append(data[at:end])
        elif kind in (b"EXIF", b"XMP "):
            info[kind.decode().strip().lower()] = data[at + 8 : end]
        at = end
    content = b"".join(kept)
    return b"RIFF" + struct.pack("<L", len(content)) + content, info


def _tiff(data: bytes) -> bytes:
    tiff = bytearray(data)
    for tag, _, at, order in _tags(data):
        if tag in _TIFF_METADATA:
            struct.pack_into(f"{order}H", tiff, at + 2, 0)  # readers pass over an unknown type
    return bytes(tiff)
