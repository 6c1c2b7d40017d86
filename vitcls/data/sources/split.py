"""One split of a data set with random access to its encoded images, and subsets of it."""

import abc
import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from vitcls.data import images
from vitcls.errors import UserError

log = logging.getLogger("vitcls")

_MAX_SHOWN = 5  # class names in a message


class Split(abc.ABC):
    """A fixed sequence of (encoded image, label). Picklable: worker processes get a copy.

    Attributes:
      name: Its name, such as "test".
      class_names: One per class, in the order of the labels.
      fingerprint: Hash of all that defines content and order; the location of the data does not.
      found: What was found and what is not used, in one line.
    """

    name: str
    class_names: tuple[str, ...]
    fingerprint: str
    found: str = ""
    _hashes: np.ndarray | None = None
    _has_warned: bool = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example. Safe to call from many threads."""

    @abc.abstractmethod
    def id(self, index: int) -> str:
        """A name of the example that does not depend on the data's place or division."""

    def hashes(self) -> np.ndarray:
        """`hash_ids` of all ids, uint64 (N,), by which examples are ranked and recognised."""
        if self._hashes is None:
            self._hashes = hash_ids(map(self.id, range(len(self))))
        return self._hashes

    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """All labels, int32 (N,)."""

    def class_counts(self) -> np.ndarray:
        """Number of examples of each class, int64 (K,)."""
        return np.bincount(self.labels(), minlength=len(self.class_names))

    def image(self, index: int) -> tuple[Image.Image, int]:
        """The image, upright and RGB, and the label of one example. Safe to call as `read`.

        Raises:
          ImageError: It cannot be decoded.
        """
        data, label = self.read(index)
        return images.decode(data), label

    def warn_of_dim(self, example: str) -> None:
        """Logs once for the split that an image of this id `images.is_dim`."""
        if not self._has_warned:
            self._has_warned = True
            advice = images.dim_advice(self.name, example)
            log.warning("%s vitcls.check_data counts all such images.", advice)

    def fill_cache(self, *, num_threads: int) -> None:
        """Decodes images to disk beforehand, see `vitcls.data.cache`; here a no-op."""
        del num_threads

    def origin(self) -> dict[str, Any]:
        """Entries of a run's manifest besides size and fingerprint, for JSON."""
        return {}


class Subset(Split):
    """Some examples of a split, in the order given by `indices`.

    Attributes:
      indices: Positions in the parent, int64 (N,).
    """

    def __init__(self, name: str, parent: Split, *, indices: np.ndarray):
        self.name = name
        self.class_names = parent.class_names
        self._parent = parent
        self.indices = np.asarray(indices, np.int64)
        digest = hashlib.sha256(parent.fingerprint.encode() + self.indices.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `Split`."""
        return self._parent.read(int(self.indices[index]))

    def image(self, index: int) -> tuple[Image.Image, int]:
        """See `Split`."""
        return self._parent.image(int(self.indices[index]))

    def fill_cache(self, *, num_threads: int) -> None:
        """See `Split`. Fills the cache of the whole parent, which other subsets share."""
        self._parent.fill_cache(num_threads=num_threads)

    def id(self, index: int) -> str:
        """See `Split`."""
        return self._parent.id(int(self.indices[index]))

    def hashes(self) -> np.ndarray:
        """See `Split`."""
        return self._parent.hashes()[self.indices]

    def labels(self) -> np.ndarray:
        """See `Split`."""
        return self._parent.labels()[self.indices]

    def origin(self) -> dict[str, Any]:
        """See `Split`."""
        return self._parent.origin()


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """A hash of each string, uint64 (N,), the same on every machine and in every version."""
    digests = (
        hashlib.blake2b(one.encode(errors="surrogateescape"), digest_size=8).digest() for one in ids
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def num_shared(one: Split, other: Split) -> int:
    """Returns how many examples of `one` are also in `other`, by their ids.

    Ids mean the same only in splits of one source.
    """
    return int(np.isin(one.hashes(), other.hashes()).sum())


def check_no_class_is_empty(split: Split, *, without: Iterable[str] = ()) -> None:
    """Raises `UserError` unless every class has an image to learn from.

    Args:
      split: The training split.
      without: Ids of images that cannot be used.
    """
    is_used = ~np.isin(split.hashes(), hash_ids(without)) if without else slice(None)
    counts = np.bincount(split.labels()[is_used], minlength=len(split.class_names))
    empty = [split.class_names[k] for k in np.flatnonzero(counts == 0)]
    if empty:
        shown = ", ".join(empty[:_MAX_SHOWN]) + (", ..." if len(empty) > _MAX_SHOWN else "")
        raise UserError(
            f"{split.name}: {len(empty)} of {len(counts)} classes have no images to train on: "
            f"{shown}. Add images of them to this split, or take the classes out of the data."
        )
