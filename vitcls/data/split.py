"""One split of a data set with random access to its encoded images, and subsets of it."""

import abc
import hashlib
from typing import Any

import numpy as np
from PIL import Image

from vitcls import images
from vitcls.data import order
from vitcls.errors import UserError


class Split(abc.ABC):
    """A fixed sequence of (encoded image, label). Picklable: worker processes get a copy.

    Attributes:
      name: Its name, such as "test".
      class_names: One per class, in the order of the labels.
      fingerprint: Hash of whatever defines the content and the order; where the data lie does not.
      found: What there is and what is not used, in one line.
    """

    name: str
    class_names: tuple[str, ...]
    fingerprint: str
    found: str = ""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example. Safe to call from many threads."""

    @abc.abstractmethod
    def id(self, index: int) -> str:
        """A name that stays with the example wherever the data lie and however they are split."""

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

    def fill_cache(self, *, num_threads: int) -> None:
        """Decodes beforehand what is kept on disk, see `vitcls.data.cache`; here nothing is."""
        del num_threads

    def origin(self) -> dict[str, Any]:
        """What a run's manifest says of the split beside its size and fingerprint, for JSON."""
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
        """See `Split`; of the whole parent, which other subsets have, too."""
        self._parent.fill_cache(num_threads=num_threads)

    def id(self, index: int) -> str:
        """See `Split`."""
        return self._parent.id(int(self.indices[index]))

    def labels(self) -> np.ndarray:
        """See `Split`."""
        return self._parent.labels()[self.indices]

    def origin(self) -> dict[str, Any]:
        """See `Split`."""
        return self._parent.origin()


def hold_out(split: Split, fraction: float, *, seed: int) -> tuple[Subset, Subset]:
    """Divides a split, stratified, into what remains and a part named "holdout".

    Of every class the held-out part has its share to within one example. Both parts keep the
    split's order.

    Args:
      split: What to divide.
      fraction: Share of the examples to hold out, between 0 and 1.
      seed: Which examples.

    Returns:
      (rest, held).

    Raises:
      UserError: The fraction leaves one of the parts empty.
    """
    num_examples = len(split)
    num_held = round(fraction * num_examples)
    if not 0 < num_held < num_examples:
        raise UserError(
            f"Holding out {fraction} of the {num_examples} examples in {split.name!r} leaves "
            f"{num_held} and {num_examples - num_held}; both parts need at least one."
        )
    # A systematic sample: every (N / n)-th example when sorted by class, in random order within.
    positions = (2 * np.arange(num_held) + 1) * num_examples // (2 * num_held)
    return _set_apart(split, _by_class(split, seed, order.HOLD_OUT)[positions])


def take_fold(split: Split, fold: int, num_folds: int, *, seed: int) -> tuple[Subset, Subset]:
    """Divides a split, stratified, into what remains and one of `num_folds` parts of equal size.

    The part is named "holdout". The folds of one seed are disjoint and cover the split; sizes, and
    the shares of every class, differ by one example at most.

    Args:
      split: What to divide.
      fold: Which part, from 1 to `num_folds`.
      num_folds: Two or more.
      seed: Which examples.

    Returns:
      (rest, held).

    Raises:
      UserError: There are fewer examples than folds.
    """
    if len(split) < num_folds:
        raise UserError(
            f"The {len(split)} examples in {split.name!r} cannot be divided into {num_folds} folds."
        )
    return _set_apart(split, _by_class(split, seed, order.HOLD_OUT)[fold - 1 :: num_folds])


def _set_apart(split: Split, held: np.ndarray) -> tuple[Subset, Subset]:
    is_held = np.zeros(len(split), bool)
    is_held[held] = True
    rest = Subset(split.name, split, indices=np.flatnonzero(~is_held))
    return rest, Subset("holdout", split, indices=np.flatnonzero(is_held))


def take_per_class(split: Split, num: int, *, seed: int) -> Subset:
    """`num` random examples of every class, in the split's order.

    With the same seed, a larger `num` adds to the examples of a smaller one.

    Raises:
      UserError: A class has fewer.
    """
    counts = split.class_counts()
    rarest = int(counts.argmin())
    if not 0 < num <= counts[rarest]:
        raise UserError(
            f"Cannot take {num} examples of every class from {split.name!r}: class "
            f"{split.class_names[rarest]!r} has {counts[rarest]}; "
            f"choose between 1 and {counts[rarest]}."
        )
    return _take(split, np.full_like(counts, num), seed=seed)


def take_long_tail(split: Split, ratio: float, *, seed: int) -> Subset:
    """Random examples whose numbers fall off exponentially from the first class to the last.

    Of K classes, class k keeps n * ratio^(-k / (K - 1)) examples, rounded down, with the largest n
    for which every class has enough: all of the first class where classes are of one size. Then a
    larger ratio also takes some of what a smaller one with the same seed does. Cui et al. 2019
    (arXiv:1901.05555), section 5.1.

    Args:
      split: Where they come from; its order is kept.
      ratio: Examples of the first class for each one of the last; 1 or more.
      seed: Which examples.

    Raises:
      UserError: A class would be left without examples.
    """
    counts = split.class_counts()
    shares = ratio ** -np.linspace(0, 1, len(counts))
    # The margin keeps whole numbers whole.
    taken = np.floor(np.min(counts / shares) * shares + 1e-6).astype(np.int64)
    if not taken.all():
        raise UserError(
            f"data.long_tail={ratio} leaves class {split.class_names[taken.argmin()]!r} of "
            f"{split.name!r} without images; choose a smaller ratio."
        )
    return _take(split, taken, seed=seed)


def _take(split: Split, nums: np.ndarray, *, seed: int) -> Subset:
    """The first `nums[k]` examples of every class k in the seed's random order."""
    labels = split.labels()
    counts = np.bincount(labels, minlength=len(split.class_names))
    by_class = _by_class(split, seed, order.TAKE)
    ranks = np.arange(len(split)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = by_class[ranks < nums[labels[by_class]]]
    return Subset(split.name, split, indices=np.sort(chosen))


def _by_class(split: Split, seed: int, stream: int) -> np.ndarray:
    """All positions in the split, sorted by class, in random order within one."""
    keys = order.bit_generator(seed, 0, stream=stream).random_raw(len(split))
    return np.lexsort((keys, split.labels()))
