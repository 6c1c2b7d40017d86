"""Facts about every image of a split, and which images are duplicates."""

import collections
import concurrent.futures
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitcls.data import images
from vitcls.data.sources.split import Split
from vitcls.errors import UserError
from vitcls.logs.progress import track

log = logging.getLogger("vitcls")

_CHUNK = 32  # images that a thread takes at a time

# A hash has the signs of the 8 x 8 lowest frequencies of 32 x 32 grey pixels, relative to their
# median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions").
_HASH_PIXELS = 32
_COSINES = np.cos(np.outer(np.arange(8), np.arange(0.5, _HASH_PIXELS)) * np.pi / _HASH_PIXELS)
# Images whose strongest frequency is weaker, in grey levels, are too uniform for a hash.
_MIN_CONTRAST = 1.0
# Copies at another size or quality usually differ in at most 3 of the 64 bits. Thumbnails of
# different images with such hashes differ by more than 5 grey levels on average.
_MAX_BITS = 3
_MAX_GREY_LEVELS = 5
_NUM_BANDS = _MAX_BITS + 1
# An image is compared with at most this many that share a band. More share it only if all images
# look alike.
_MAX_NEIGHBOURS = 1000


class Facts(NamedTuple):
    """Facts about one image; if it cannot be decoded, only `error` is set."""

    error: str = ""  # why it cannot be decoded
    width: int = 0
    height: int = 0
    mode: str = ""  # the stored mode, before conversion to RGB
    format: str = ""
    is_animated: bool = False
    is_dim: bool = False  # see `images.is_dim`
    digest: bytes = b""  # of its size and upright RGB pixels
    hash: int = 0  # 64 bits that are nearly the same in copies; 0: too little contrast
    thumbnail: bytes = b""  # 8 x 8 grey levels


def survey(split: Split, *, num_threads: int) -> list[Facts]:
    """Decodes every image of a split, in order.

    Raises:
      StorageError: A file cannot be read any more.
    """

    def look_at(start: int) -> list[Facts]:
        indices = range(start, min(start + _CHUNK, len(split)))
        return [_facts(split, index) for index in indices]

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        starts = range(0, len(split), _CHUNK)
        chunks = pool.map(look_at, starts)
        progress = track(chunks, f"Decoding {split.name}", total=len(starts))
        facts = list(itertools.chain.from_iterable(progress))
    dim = [index for index, one in enumerate(facts) if one.is_dim]
    if dim:
        advice = images.dim_advice(split.name, split.id(dim[0]))
        log.warning("%s Such images: %d of %d.", advice, len(dim), len(facts))
    return facts


def _facts(split: Split, index: int) -> Facts:
    try:
        data, _ = split.read(index)
        image = images.decode(data)
    except UserError as error:
        return Facts(error=str(error))
    stored = images.stored(data)
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    hash_and_thumbnail = perceptual_hash(image)
    return Facts(
        "", *image.size, stored.mode, stored.format, _is_animated(stored), images.is_dim(image),
        digest.digest()[:16], *hash_and_thumbnail,
    )  # fmt: skip


def _is_animated(stored: Image.Image) -> bool:
    if stored.format == "MPO":  # a photograph with a second one, such as a preview or the other eye
        return False
    try:
        return getattr(stored, "is_animated", False)
    # Pillow looks for the second frame of a GIF. One that is cut off still makes it animated.
    except Exception:
        return True


def perceptual_hash(image: Image.Image) -> tuple[int, bytes]:
    """A hash of an RGB image, 0 without contrast, and a thumbnail; copies have nearly the same."""
    # Resizing before converting to grey reads the pixels only once.
    small = image.resize((_HASH_PIXELS, _HASH_PIXELS), Image.Resampling.BICUBIC, reducing_gap=3)
    small = small.convert("L")
    frequencies = _COSINES @ np.asarray(small, np.float64) @ _COSINES.T
    amplitudes = frequencies.ravel()[1:] * (4 / _HASH_PIXELS**2)  # without the mean
    bits = np.append(amplitudes > np.median(amplitudes), True)  # never 0
    has_contrast = np.abs(amplitudes).max() >= _MIN_CONTRAST
    code = int(np.packbits(bits).view(">u8")[0]) if has_contrast else 0
    return code, small.reduce(_HASH_PIXELS // 8).tobytes()


def find_duplicates(facts: Sequence[Facts]) -> list[list[int]]:
    """Groups of two or more images with the same or nearly the same pixels.

    Two images are also in one group if a chain of such pairs connects them.

    Returns:
      Positions in `facts`, ascending in each group; groups are ordered by their first position.
    """
    same = collections.defaultdict(list)  # positions by digest
    for position, one in enumerate(facts):
        if not one.error:
            same[one.digest].append(position)
    firsts = [positions[0] for positions in same.values() if facts[positions[0]].hash]
    parents = {position: position for position in range(len(facts))}  # a tree for each group

    def root(position: int) -> int:
        while parents[position] != position:
            parents[position] = position = parents[parents[position]]
        return position

    hashes = np.array([facts[first].hash for first in firsts], np.uint64)
    thumbnails = np.frombuffer(b"".join(facts[first].thumbnail for first in firsts), np.uint8)
    for one, other in _near_pairs(hashes, thumbnails.reshape(-1, 64)):
        low, high = sorted((root(firsts[one]), root(firsts[other])))
        parents[high] = low
    groups = collections.defaultdict(list)
    for positions in same.values():
        groups[root(positions[0])] += positions
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _near_pairs(hashes: np.ndarray, thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """Positions of pairs of images that look nearly the same; a pair may come more than once.

    Args:
      hashes: uint64 (N,).
      thumbnails: uint8 (N, 64).
    """
    # Hashes that differ in fewer bits than there are bands are equal in one band at least. Only
    # images that share a band are compared, which are few.
    width = np.uint64(64 // _NUM_BANDS)
    for band in range(_NUM_BANDS):
        values = hashes >> (np.uint64(band) * width) & np.uint64(2 ** int(width) - 1)
        by_value = np.lexsort((hashes, values))
        values = values[by_value]
        active = np.arange(len(hashes))  # rows whose neighbour at distance `shift` shares the band
        for shift in range(1, _MAX_NEIGHBOURS):
            active = active[active + shift < len(hashes)]
            active = active[values[active] == values[active + shift]]
            if not active.size:
                break
            one, other = by_value[active], by_value[active + shift]
            is_near = np.bitwise_count(hashes[one] ^ hashes[other]) <= _MAX_BITS
            one, other = one[is_near], other[is_near]
            grey_levels = np.abs(thumbnails[one].astype(np.int16) - thumbnails[other]).mean(1)
            is_near = grey_levels <= _MAX_GREY_LEVELS
            yield from zip(one[is_near].tolist(), other[is_near].tolist(), strict=True)
