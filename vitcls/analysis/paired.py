"""Tests whether two groups of runs differ by more than the chance of test images and seeds.

The metric of run s on image i is modelled as mean + seed_s + image_i + rest_si, the crossed design
of readers and cases (Gallas 2006, doi:10.1016/j.acra.2005.11.030). N images, S seeds, R resamples.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8  # in `seeds_needed`: the chance to find the observed difference
MAX_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Sample:
    """A metric of a group's runs, all measured on the same images.

    Attributes:
      values: float64 (S,).
      resampled: float64 (R, S), the metric on resamples of the images, which all groups share.
    """

    values: np.ndarray
    resampled: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of one group minus that of another, and how far it can be trusted.

    Attributes:
      value: The difference.
      images: Variance from the choice of images, which more seeds would not reduce.
      seeds: (variance between seeds, number of seeds) of each sample; empty if a group has one
        seed, so that seeds do not count.
      p: p value of the two-sided test of equal means.
    """

    value: float
    images: float
    seeds: tuple[tuple[float, int], ...]
    p: float

    def variance(self, num_more: float = 0) -> float:
        """Variance of `value` after `num_more` more seeds in each group."""
        return self.images + sum(by_seed / (num + num_more) for by_seed, num in self.seeds)

    def degrees(self, num_more: float = 0) -> float:
        """Satterthwaite's degrees of freedom (1946, doi:10.2307/3002019); infinite for images."""
        parts = [
            (by_seed / (num + num_more)) ** 2 / (num + num_more - 1) for by_seed, num in self.seeds
        ]
        return self.variance(num_more) ** 2 / sum(parts) if sum(parts) else math.inf

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `value`."""
        half = stats.t.ppf((1 + LEVEL) / 2, self.degrees()) * math.sqrt(self.variance())
        return self.value - half, self.value + half


def difference(a: Sample, b: Sample, *, same_seeds: bool) -> Difference:
    """Tests a difference over images, which are paired, and over seeds.

    Seeds count if both groups have two or more. Their variance comes from the differences between
    runs of one seed if `same_seeds`, otherwise from the spread within each group (Welch). Student's
    t is used because resamples of three seeds would be too alike. The variance over images comes
    from the resamples. The effect of a seed on single images is in both and counts once.

    Args:
      a: The first group.
      b: The second group, on the same images and resamples.
      same_seeds: Whether the runs of both groups have the same seeds in the same order.
    """
    value = float(a.values.mean() - b.values.mean())
    images = float((a.resampled.mean(1) - b.resampled.mean(1)).var())
    samples = [Sample(a.values - b.values, a.resampled - b.resampled)] if same_seeds else [a, b]
    if min(len(a.values), len(b.values)) < 2:
        samples = []
    seeds = []
    for sample in samples:
        num = len(sample.values)
        rest = sample.resampled - sample.resampled.mean(1, keepdims=True)
        noise = rest.var(axis=0).sum() / (num - 1)  # effect of a seed on single images
        seeds.append((float(max(sample.values.var(ddof=1), noise)), num))
        images -= noise / num
    found = Difference(value, float(max(images, 0)), tuple(seeds), 1.0)
    # Rounding leaves about 1e-17 where nothing varies.
    if found.variance() < 1e-24:
        return dataclasses.replace(found, images=0.0, seeds=tuple((0.0, num) for _, num in seeds))
    t = abs(value) / math.sqrt(found.variance())
    return dataclasses.replace(found, p=float(2 * stats.t.sf(t, found.degrees())))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """P value of the exact McNemar test (1947) that two runs are right equally often.

    Args:
      a: Whether one run is right, bool (N,).
      b: Whether the other run is right on the same images, bool (N,).
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flips(differences: np.ndarray) -> float:
    """P value of the exact test that a difference is as likely above 0 as below.

    Fisher's randomisation test of pairs (1935, The Design of Experiments, section 21): the share of
    all choices of signs whose sum is as far from 0. For 1, 0 and -1 it is McNemar's test.

    Args:
      differences: Integers (N,).
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # of each sum of the positive differences
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        own = np.zeros(size * count + 1)
        own[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, own)  # an FFT would lose small chances
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return float(min(1.0, chances[np.abs(sums) >= abs(differences.sum())].sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Corrects p values for their number, in the same order (Holm 1979)."""
    corrected, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def over_seeds(values: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, standard deviation, 95 % t interval of (S,); all but the mean are NaN for one seed."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan, math.nan
    spread = float(values.std(ddof=1))
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * spread / math.sqrt(len(values))
    return mean, spread, mean - half, mean + half


def seeds_needed(found: Difference, *, num_tests: int) -> int | None:
    """How many more seeds per group would show the difference, if it is as large as observed.

    With 80 % power, at a level of 5 % divided by `num_tests`.

    Returns:
      At most `MAX_SEEDS`; None if no number suffices: there are too few images, or no difference.
    """

    def is_enough(num_more: float) -> bool:
        degrees = found.degrees(num_more)
        needed = stats.t.ppf(1 - (1 - LEVEL) / 2 / num_tests, degrees) + stats.t.ppf(POWER, degrees)
        return abs(found.value) >= needed * math.sqrt(found.variance(num_more))

    if not found.seeds or not found.value or not is_enough(1e12):
        return None
    low, high = 0, MAX_SEEDS  # not enough, perhaps enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def images_needed(found: Difference, num_images: int, *, num_tests: int) -> int | None:
    """How many images would show it with unlimited seeds; otherwise as `seeds_needed`."""
    if not found.value:
        return None
    needed = stats.norm.ppf(1 - (1 - LEVEL) / 2 / num_tests) + stats.norm.ppf(POWER)
    return math.ceil(num_images * found.images * (needed / found.value) ** 2)
