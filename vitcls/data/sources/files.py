"""Image files below a root folder, class by class, and how they are divided without splits."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls.data.sources.division import hold_out, hold_out_of_each
from vitcls.data.sources.split import Split, Subset
from vitcls.errors import StorageError, UserError

# The test part of data without splits. It is the same in every run: results stay comparable.
# The seed is above the range of train.seed, so that hold-outs are sampled independently.
TEST_FRACTION = 0.2
_DIVISION_SEED = 2**32

# Listing waits for the disk or the network: more threads than processors.
NUM_THREADS = 16
_MAX_SHOWN = 5  # names in a message


class FilesSplit(Split):
    """Files, ordered by class and within a class as listed; an id is the path below the root."""

    def __init__(
        self,
        root: str,
        name: str,
        *,
        class_names: Sequence[str],
        listings: Sequence[list[tuple[str, int]]],
    ):
        """Takes what was listed.

        Args:
          root: Absolute path of the folder that the images are in.
          name: Name of the split.
          class_names: In the order of the labels.
          listings: For each class, (path relative to the root, size in bytes) of its images.
        """
        self.name = name
        self.class_names = tuple(class_names)
        self._root = root
        # One string for all paths: a million of them reach a worker process as one object.
        paths = [os.fsencode(path) for listing in listings for path, _ in listing]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths])
        counts = [len(listing) for listing in listings]
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        sizes = np.array([size for listing in listings for _, size in listing], "<i8")
        self.fingerprint = _fingerprint(self.class_names, paths, sizes)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example.

        Raises:
          UserError: The file may not be read.
          StorageError: It is gone, or the disk fails.
        """
        path = os.path.join(self._root, self.id(index))
        try:
            with open(path, "rb") as file:
                return file.read(), int(self._labels[index])
        except PermissionError as error:
            raise UserError(f"No permission to read {path}.") from error
        except OSError as error:
            raise StorageError(
                f"Cannot read {path}, which was there at the start: {error.strerror}."
            ) from error

    def id(self, index: int) -> str:
        """The path relative to the root."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._paths[start : self._ends[index]])

    def labels(self) -> np.ndarray:
        """All labels, int32 (N,), without reading an image."""
        return self._labels

    def origin(self) -> dict[str, Any]:
        """The listing's hash, which covers class names, paths and sizes of files."""
        return {"listing_sha256": self.fingerprint}


class DividedSplit(Subset):
    """The "train" or the "test" part of data without splits."""

    def __init__(self, name: str, whole: Split, *, indices: np.ndarray, division: str):
        """As `Subset`; `division` is one of `vitcls.data.sources.division.DIVISIONS`."""
        super().__init__(name, whole, indices=indices)
        self._division = division

    def divided_by(self, division: str) -> "DividedSplit":
        """The part of this name in another division of the same whole."""
        part = divide(self._parent, self.name, division=division)
        part.found = self.found
        return part

    def origin(self) -> dict[str, Any]:
        """The whole's, and how it was divided."""
        fractions = {"train": 1 - TEST_FRACTION, "test": TEST_FRACTION}
        divided = {"fractions": fractions, "seed": _DIVISION_SEED, "by": self._division}
        return super().origin() | {"divided": divided}


def divide(whole: Split, split: str, *, division: str = "hash") -> DividedSplit:
    """The part "train" or "test" of data without splits; a fifth of every class is the test's.

    Raises:
      UserError: A class has one image only.
    """
    counts = whole.class_counts()
    if counts.min() < 2:
        raise UserError(
            f"{whole.class_names[counts.argmin()]!r} has one image only; data without splits are "
            "divided into train and test, which needs two images or more of each class."
        )
    if division == "position":
        rest, held = hold_out(whole, TEST_FRACTION, seed=_DIVISION_SEED, division=division)
    else:
        rest, held = hold_out_of_each(whole, TEST_FRACTION, seed=_DIVISION_SEED)
    indices = (rest if split == "train" else held).indices
    return DividedSplit(split, whole, indices=indices, division=division)


def show(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")


def _fingerprint(class_names: tuple[str, ...], paths: list[bytes], sizes: np.ndarray) -> str:
    """Hash of class names, relative paths and sizes; contents would have to be read."""
    digest = hashlib.sha256()
    for part in (*map(os.fsencode, class_names), b"", *paths):
        digest.update(part + b"\0")  # no file name holds a zero: nothing else hashes the same
    digest.update(sizes.tobytes())
    return digest.hexdigest()
