"""Parts of a split: held out, one of several folds, or so many examples of each class.

Within its class an example is ranked by a random key, a hash of its id and the seed, and a part is
a range of ranks. So one more file moves at most one other image of its class across each end of the
range. In folds, test splits and samples it moves no image of another class. A hold-out has the
same size with every seed, so one other class may give one image more or less.

N examples, K classes.
"""

import numpy as np

from vitcls.data import order
from vitcls.data.sources.split import Split, Subset, hash_ids
from vitcls.errors import UserError

# How examples get their random order: by a "hash" of their ids, or by their "position",
# which one more file changes for all after it. Runs of earlier versions continue by position.
DIVISIONS = ("hash", "position")


def hold_out(
    split: Split, fraction: float, *, seed: int, division: str = "hash"
) -> tuple[Subset, Subset]:
    """Divides a split, stratified, into what remains and a part named "holdout".

    The held-out part has each class' share to within one example, and never its last one. Where
    shares are not whole numbers, the seed decides which classes give one more. Both parts keep the
    split's order.

    Args:
      split: What to divide.
      fraction: Share of the examples to hold out, between 0 and 1.
      seed: Which examples.
      division: One of `DIVISIONS`.

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
    if division == "position":
        positions = (2 * np.arange(num_held) + 1) * num_examples // (2 * num_held)
        return _set_apart(split, _by_class(split, seed, order.HOLD_OUT, division)[positions])
    ends = _shares(split, fraction, num_held, seed=seed)
    if not ends.any():
        raise UserError(
            f"Nothing can be held out of {split.name!r}: every class has one image, which it needs "
            "for training. Set data.holdout=0 and eval.select_split=''."
        )
    return _set_apart(split, _first(split, ends, seed=seed, stream=order.HOLD_OUT))


def hold_out_of_each(split: Split, fraction: float, *, seed: int) -> tuple[Subset, Subset]:
    """As `hold_out`, but the number from each class depends on no other class."""
    counts = split.class_counts()
    ends = np.minimum(_even(counts, fraction), np.maximum(counts - 1, 0))
    return _set_apart(split, _first(split, ends, seed=seed, stream=order.HOLD_OUT))


def _shares(split: Split, fraction: float, total: int, *, seed: int) -> np.ndarray:
    """The number from each class, int64 (K,): `total` in all, but never a class' last example."""
    counts = split.class_counts()
    exact = np.round(fraction * counts, 9)  # whole numbers are to be whole
    shares = np.floor(exact).astype(np.int64)
    # The seed samples the classes that give one more, preferring those that miss more of it.
    bits = order.random_keys(hash_ids(split.class_names), seed, stream=order.HOLD_OUT)
    scores = exact - shares + (bits >> np.uint64(11)) * 2.0**-53
    scores[exact == shares] -= 2
    can_give = np.flatnonzero(shares + 1 < counts)
    best = can_give[np.argsort(-scores[can_give], kind="stable")]
    shares[best[: total - shares.sum()]] += 1
    return shares


def take_fold(
    split: Split, fold: int, num_folds: int, *, seed: int, division: str = "hash"
) -> tuple[Subset, Subset]:
    """Divides a split, stratified, into what remains and one of `num_folds` parts of equal size.

    The part is named "holdout". The folds of one seed are disjoint and cover the split, but for
    images that are alone in their class: these are never held out. The shares of a class differ by
    one example at most; sizes do where classes are of one size.

    Args:
      split: What to divide.
      fold: Which part, from 1 to `num_folds`.
      num_folds: Two or more.
      seed: Which examples.
      division: One of `DIVISIONS`.

    Returns:
      (rest, held).

    Raises:
      UserError: There are fewer examples than folds, or none in this fold.
    """
    if len(split) < num_folds:
        raise UserError(
            f"The {len(split)} examples in {split.name!r} cannot be divided into {num_folds} folds."
        )
    if division == "position":
        by_class = _by_class(split, seed, order.HOLD_OUT, division)
        return _set_apart(split, by_class[fold - 1 :: num_folds])
    counts = split.class_counts()
    starts, ends = (_even(counts, number / num_folds) for number in (fold - 1, fold))
    ends = np.where(counts > 1, ends, starts)
    if not (ends > starts).any():
        raise UserError(
            f"Fold {fold} of {num_folds} of {split.name!r} has no images, as classes are so small; "
            "use fewer folds."
        )
    held = _first(split, ends, starts=starts, seed=seed, stream=order.HOLD_OUT)
    return _set_apart(split, held)


def _even(counts: np.ndarray, fraction: float) -> np.ndarray:
    """That share of each class, int64 (K,), rounded up or down evenly over the classes.

    Each is rounded by itself. For classes of one size the sum is nevertheless the share of all
    (Hermite's identity).
    """
    offsets = (np.arange(len(counts)) + 0.5) / len(counts)
    return np.floor(fraction * counts + offsets).astype(np.int64)


def _set_apart(split: Split, held: np.ndarray) -> tuple[Subset, Subset]:
    is_held = np.zeros(len(split), bool)
    is_held[held] = True
    rest = Subset(split.name, split, indices=np.flatnonzero(~is_held))
    return rest, Subset("holdout", split, indices=np.flatnonzero(is_held))


def take_per_class(split: Split, num: int, *, seed: int, division: str = "hash") -> Subset:
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
    return _take(split, np.full_like(counts, num), seed=seed, division=division)


def take_long_tail(split: Split, ratio: float, *, seed: int, division: str = "hash") -> Subset:
    """Random examples whose numbers fall off exponentially from the first class to the last.

    Class k of K keeps n * ratio^(-k / (K - 1)) examples, rounded down, with the largest n for which
    every class has enough. With classes of one size, that is all of the first class; then a larger
    ratio takes some of the examples of a smaller one with the same seed. Cui et al. 2019
    (arXiv:1901.05555), section 5.1.

    Args:
      split: Their split, whose order is kept.
      ratio: Examples of the first class for each one of the last; 1 or more.
      seed: Which examples.
      division: One of `DIVISIONS`.

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
    return _take(split, taken, seed=seed, division=division)


def _take(split: Split, nums: np.ndarray, *, seed: int, division: str) -> Subset:
    """The first `nums[k]` examples of every class k in the seed's random order."""
    chosen = _first(split, nums, seed=seed, stream=order.TAKE, division=division)
    return Subset(split.name, split, indices=np.sort(chosen))


def _first(
    split: Split,
    ends: np.ndarray,
    *,
    starts: np.ndarray | None = None,
    seed: int,
    stream: int,
    division: str = "hash",
) -> np.ndarray:
    """Positions of the first ends[k] examples of every class k in random order, from starts[k]."""
    starts = np.zeros_like(ends) if starts is None else starts
    labels, counts = split.labels(), split.class_counts()
    by_class = _by_class(split, seed, stream, division)
    ranks = np.arange(len(split)) - np.repeat(np.cumsum(counts) - counts, counts)
    classes = labels[by_class]
    return by_class[(starts[classes] <= ranks) & (ranks < ends[classes])]


def _by_class(split: Split, seed: int, stream: int, division: str) -> np.ndarray:
    """All positions in the split, sorted by class, in random order within one."""
    if division == "position":
        keys = order.bit_generator(seed, 0, stream=stream).random_raw(len(split))
    else:  # where images come in groups, the hash of the group's name belongs here
        keys = order.random_keys(split.hashes(), seed, stream=stream)
    return np.lexsort((keys, split.labels()))
