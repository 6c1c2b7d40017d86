"""Decoded images, kept in memory or on disk: `data.cache`.

Only whole images of 8 bits per channel are kept, so that crops and batches stay what they are
without a cache. An image that cannot be decoded is not kept: its readers get the same error.

On disk, a split is a folder of at most `_MAX_SHARDS` files. Each has the pixels of consecutive
images one after the other, then one row (offset, width, height, label) per image, int64. Files
appear complete, under their names, or not at all; processes map them and so share the system's one
copy in memory. Their sizes are checked, their pixels are not.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import math
import mmap
import os
import pathlib
import shutil
import tempfile
import threading
from typing import Any

import numpy as np
import PIL
from PIL import Image

from vitcls.data import images
from vitcls.data.sources.split import Split
from vitcls.errors import StorageError, UserError
from vitcls.folders import lock
from vitcls.logs.progress import track
from vitcls.processes.memory import available_memory

log = logging.getLogger("vitcls")

_VERSION = 2  # of the files and of the result of `images.decode`
# A map needs an open file, and a process may have 1024 open files in all.
_MAX_SHARDS = 64
_MIN_IMAGES = 16  # of a shard
_ROW_BYTES = 4 * 8
_NUM_SAMPLED = 32
_SPARE_MEMORY = 2**30  # bytes left for the rest of the run
_MEMORY_LOCK = threading.Lock()  # shared: a split with its own lock could not be pickled


def cached(split: Split, where: str) -> Split:
    """The same split with decoded images.

    Args:
      split: The split. Its fingerprint and ids stay the same.
      where: "ram", a folder, or "" for the split itself.
    """
    if not where:
        return split
    if where == "ram":
        return RamCache(split)
    return DiskCache(split, pathlib.Path(where).expanduser().absolute())


class _Cached(Split):
    """A split that differs from another one only in how images are decoded."""

    def __init__(self, split: Split):
        self.name = split.name
        self.class_names = split.class_names
        self.fingerprint = split.fingerprint
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `Split`."""
        return self._split.read(index)

    def id(self, index: int) -> str:
        """See `Split`."""
        return self._split.id(index)

    def hashes(self) -> np.ndarray:
        """See `Split`."""
        return self._split.hashes()

    def labels(self) -> np.ndarray:
        """See `Split`."""
        return self._split.labels()

    def origin(self) -> dict[str, Any]:
        """See `Split`."""
        return self._split.origin()


class RamCache(_Cached):
    """Keeps every image after its first use, as long as all remaining images also fit."""

    def __init__(self, split: Split):
        super().__init__(split)
        _, self._mean_bytes = sample(split)
        self._images: dict[int, tuple[tuple[int, int], bytes, int]] = {}
        self._is_filling = True

    def image(self, index: int) -> tuple[Image.Image, int]:
        """See `Split`. Threads that ask for the same image at first each decode it."""
        if index in self._images:
            size, pixels, label = self._images[index]
            return _to_image(size, pixels), label
        image, label = self._split.image(index)
        if self._has_room():
            self._images[index] = image.size, image.tobytes(), label
        return image, label

    def _has_room(self) -> bool:
        """Whether all images that are not kept yet fit into memory; once False, always False."""
        with _MEMORY_LOCK:  # one warning, however many threads
            if not self._is_filling:
                return False
            needed = self._mean_bytes * (len(self) - len(self._images))
            available = available_memory() - _SPARE_MEMORY
            if needed > available:
                self._is_filling = False
                log.warning(
                    "data.cache='ram': %d images of split %r need about %s more, and %s are "
                    "available; %d are kept, the others are decoded every time. Set data.cache to "
                    "a folder on a local disk instead.",
                    len(self), self.name, _gigabytes(needed), _gigabytes(max(available, 0)),
                    len(self._images),
                )  # fmt: skip
            return self._is_filling


class DiskCache(_Cached):
    """Maps the images from files, which `fill_cache` writes."""

    def __init__(self, split: Split, folder: pathlib.Path):
        """The files are in `folder/vitcls-cache/KEY`, where KEY identifies these images."""
        super().__init__(split)
        key, self._mean_bytes = sample(split)
        self._folder = folder / "vitcls-cache" / key
        self._images_per_shard = max(_MIN_IMAGES, math.ceil(len(split) / _MAX_SHARDS))
        self._shards: dict[int, tuple[memoryview, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # every process maps the files itself

    def image(self, index: int) -> tuple[Image.Image, int]:
        """See `Split`.

        Raises:
          ImageError: It cannot be decoded.
          StorageError: Its file is missing or damaged.
        """
        number, row = divmod(index, self._images_per_shard)
        try:
            pixels, rows = self._shard(number)
        except (OSError, ValueError) as error:
            raise StorageError(
                f"data.cache: cannot read {self._path(number)}, which was there at the start: "
                f"{error}. Run again to have it written again."
            ) from error
        offset, width, height, label = rows[row].tolist()
        if not width:
            return self._split.image(index)  # the error, unless the image was fixed since
        return _to_image((width, height), pixels[offset : offset + 3 * width * height]), label

    def fill_cache(self, *, num_threads: int) -> None:
        """Writes the files that are missing or damaged; of several processes, only one does.

        Raises:
          StorageError: The folder cannot be written or has too little room, or an original cannot
            be read. Files that are complete stay.
        """
        try:
            if not self._missing():
                return
            with lock.waiting(self._folder / "lock") as (_, is_alone):
                if is_alone:
                    for unfinished in self._folder.glob("unfinished-*"):  # of killed processes
                        shutil.rmtree(unfinished)
                missing = self._missing()
                if missing:  # still, after others may have had the lock
                    self._check_room(missing)
                    self._write(missing, num_threads)
        except BrokenPipeError:  # from writing our own messages
            raise
        except OSError as error:
            raise StorageError(
                f"data.cache: cannot write {self._folder}: {error.strerror}. Make room or fix it "
                "and run again, which continues from here, or set data.cache to another folder or "
                "to ''."
            ) from error

    def _check_room(self, missing: list[int]) -> None:
        needed = self._mean_bytes * sum(map(self._num_images, missing))
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise StorageError(
                f"data.cache: the decoded images of split {self.name!r} need about "
                f"{_gigabytes(needed)} more in {self._folder}, where {_gigabytes(free)} are free; "
                "make room, or set data.cache to another folder or to ''."
            )
        log.info(
            "Decoding images of split %r into %s, about %s.",
            self.name, self._folder, _gigabytes(needed),
        )  # fmt: skip

    def _missing(self) -> list[int]:
        """Numbers of the shards that are missing or damaged; maps the others."""
        missing = []
        for number in range(math.ceil(len(self) / self._images_per_shard)):
            try:
                self._shard(number)
            except (FileNotFoundError, ValueError):
                missing.append(number)
        return missing

    def _write(self, missing: list[int], num_threads: int) -> None:
        is_stopped = threading.Event()
        with (
            tempfile.TemporaryDirectory(prefix="unfinished-", dir=self._folder) as unfinished,
            concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
        ):
            try:
                shards = [
                    pool.submit(self._write_shard, number, unfinished, is_stopped)
                    for number in missing
                ]
                done = concurrent.futures.as_completed(shards)
                for shard in track(done, f"Decoding {self.name}", total=len(shards)):
                    shard.result()
            finally:  # an error or Ctrl-C ends all threads within one image
                is_stopped.set()

    def _write_shard(self, number: int, unfinished: str, is_stopped: threading.Event) -> None:
        path = self._path(number)
        aside = os.path.join(unfinished, path.name)
        start = number * self._images_per_shard
        rows, end = [], 0
        with open(aside, "wb") as file:
            for index in range(start, start + self._num_images(number)):
                if is_stopped.is_set():
                    return
                try:
                    image, label = self._split.image(index)
                except UserError:
                    rows.append((end, 0, 0, 0))
                    continue
                if images.is_dim(image):
                    self.warn_of_dim(self.id(index))
                rows.append((end, *image.size, label))
                end += file.write(image.tobytes())
            file.write(np.array(rows, "<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())  # so a file of the right size holds its pixels after a crash
        os.replace(aside, path)

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"{number:03}.rgb"

    def _num_images(self, number: int) -> int:
        return min(self._images_per_shard, len(self) - number * self._images_per_shard)

    def _shard(self, number: int) -> tuple[memoryview, np.ndarray]:
        """Pixels and rows of a shard, mapped once per process.

        Raises:
          OSError: It cannot be opened.
          ValueError: Its size is not what its rows say.
        """
        if number not in self._shards:
            with open(self._path(number), "rb") as file:
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            end = len(content) - self._num_images(number) * _ROW_BYTES
            rows = np.frombuffer(content[max(end, 0) :], "<i8").reshape(-1, 4)
            offset, width, height, _ = rows[-1].tolist()
            if offset + 3 * width * height != end:
                raise ValueError("its size is wrong")
            self._shards[number] = content, rows
        return self._shards[number]


def _to_image(size: tuple[int, int], pixels: bytes | memoryview) -> Image.Image:
    # This copies, as Pillow keeps RGB in 4 bytes per pixel. Keeping 4 bytes would save the copy, a
    # small part of a crop's time, but take a third more room.
    return Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1)


def sample(split: Split) -> tuple[str, float]:
    """A hash that identifies the split's images, and their mean number of bytes when decoded.

    Both come from a few images. The fingerprint alone is not enough: for folders it covers names
    and sizes of files, and uncompressed images of one size are all equally long.
    """
    digest = hashlib.sha256(f"{_VERSION} {PIL.__version__} {split.fingerprint}".encode())
    sizes = []
    indices = np.linspace(0, len(split) - 1, min(len(split), _NUM_SAMPLED), dtype=np.int64)
    for index in indices.tolist():
        with contextlib.suppress(UserError):  # raised again when the image is used
            data, _ = split.read(index)
            digest.update(hashlib.sha256(data).digest())
            sizes.append(_decoded_bytes(data))
    return digest.hexdigest(), float(np.mean(sizes or [0]))


def _decoded_bytes(data: bytes) -> int:
    """Bytes of the decoded image, from its header; 0 if that cannot be read."""
    try:
        image = images.stored(data)
    except images.ImageError:
        return 0
    return 3 * image.width * image.height


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
