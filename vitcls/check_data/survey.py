"""What every image of a split is like, and which images show the same."""

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

# A hash is the signs of the 8 x 8 lowest frequencies of 32 x 32 grey pixels, relative to their
# median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions").
_HASH_PIXELS = 32
_COSINES = np.cos(np.outer(np.arange(8), np.arange(0.5, _HASH_PIXELS)) * np.pi / _HASH_PIXELS)
# Images whose strongest frequency is weaker, in grey levels, have nothing that a hash could name.
_LEAST_CONTRAST = 1.0
# Copies at another size or quality differ in so many of the 64 bits at most, as a rule; and where
# different images do, their thumbnails differ by more than so many grey levels in the mean.
_MOST_BITS = 3
_MOST_GREY_LEVELS = 5
_BANDS = _MOST_BITS + 1
# An image is compared with so many that share a band; more do where all look alike.
_MOST_NEIGHBOURS = 1000


class Facts(NamedTuple):
    """About one image; where it cannot be decoded, only `error` says anything."""

    error: str = ""  # why it cannot be decoded
    width: int = 0
    height: int = 0
    mode: str = ""  # as it is stored, before it becomes RGB
    format: str = ""
    is_animated: bool = False
    is_dim: bool = False  # see `images.is_dim`
    digest: bytes = b""  # of its size and upright RGB pixels
    hash: int = 0  # 64 bits that stay nearly the same in copies; 0: it shows nothing
    thumbnail: bytes = b""  # 8 x 8 grey levels


def survey(split: Split, *, num_threads: int) -> list[Facts]:
    """Decodes every image of a split, in its order.

    Raises:
      StorageError: An image cannot be read any more.
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
    except Exception:  # GIF looks for a second frame, which began, but may be cut anywhere
        return True


def perceptual_hash(image: Image.Image) -> tuple[int, bytes]:
    """What copies of an RGB image nearly share: 64 bits, 0 without contrast, and a thumbnail."""
    # Small first, grey after: so the cost is that of one pass over the pixels.
    small = image.resize((_HASH_PIXELS, _HASH_PIXELS), Image.Resampling.BICUBIC, reducing_gap=3)
    small = small.convert("L")
    frequencies = _COSINES @ np.asarray(small, np.float64) @ _COSINES.T
    amplitudes = frequencies.ravel()[1:] * (4 / _HASH_PIXELS**2)  # without the mean
    bits = np.append(amplitudes > np.median(amplitudes), True)  # never 0
    has_contrast = np.abs(amplitudes).max() >= _LEAST_CONTRAST
    code = int(np.packbits(bits).view(">u8")[0]) if has_contrast else 0
    return code, small.reduce(_HASH_PIXELS // 8).tobytes()


def find_duplicates(facts: Sequence[Facts]) -> list[list[int]]:
    """Groups of two or more images with the same pixels, or that look nearly the same.

    Two images also are in one group where a chain of such pairs leads from one to the other.

    Returns:
      Positions in `facts`, ascending in each group; groups in the order of their first one.
    """
    same = collections.defaultdict(list)  # positions by pixels
    for position, one in enumerate(facts):
        if not one.error:
            same[one.digest].append(position)
    firsts = [positions[0] for positions in same.values() if facts[positions[0]].hash]
    parents = {position: position for position in range(len(facts))}  # of a tree per group

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
    """Positions of pairs of images that look nearly the same, some more than once.

    Args:
      hashes: uint64 (N,).
      thumbnails: uint8 (N, 64).
    """
    # With fewer different bits than bands, one of the bands is the same: only images that share one
    # are compared, of which there are few.
    width = np.uint64(64 // _BANDS)
    for band in range(_BANDS):
        values = hashes >> (np.uint64(band) * width) & np.uint64(2 ** int(width) - 1)
        by_value = np.lexsort((hashes, values))
        values = values[by_value]
        active = np.arange(len(hashes))  # whose neighbour at the distance `shift` shares the band
        for shift in range(1, _MOST_NEIGHBOURS):
            active = active[active + shift < len(hashes)]
            active = active[values[active] == values[active + shift]]
            if not active.size:
                break
            one, other = by_value[active], by_value[active + shift]
            is_near = np.bitwise_count(hashes[one] ^ hashes[other]) <= _MOST_BITS
            one, other = one[is_near], other[is_near]
            grey_levels = np.abs(thumbnails[one].astype(np.int16) - thumbnails[other]).mean(1)
            is_near = grey_levels <= _MOST_GREY_LEVELS
            yield from zip(one[is_near].tolist(), other[is_near].tolist(), strict=True)
