"""All metrics of one split from its predictions, with bootstrap intervals.

N images, K classes, R resamples.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vitcls.analysis import weighted
from vitcls.analysis.predictions import Predictions
from vitcls.decision import rule

NUM_RESAMPLES = 1000
_LEVEL = 0.95
# Limits resamples x N * K for the metrics that read all probabilities: about 20 seconds.
_MAX_PROBABILITIES = 1_000_000_000
# With fewer resamples an interval would say little.
_MIN_RESAMPLES = 200
_CHUNK = 4_000_000  # weights in memory at once


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % interval, whose ends are NaN if there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


def summarise(
    found: Predictions, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Returns every metric of `weighted` by its name.

    Intervals span the 2.5th to the 97.5th percentile over resamples of the images. `roc_auc`,
    `average_precision` and `classwise_ece` read all N * K probabilities: they get fewer resamples
    if these are many, and no interval if they are too many.
    """
    labels, logits, probabilities = found.labels, found.logits, found.probabilities
    cheap = [
        weighted.means(labels, logits),
        weighted.by_class(labels, logits),
        weighted.calibration(labels, probabilities),
        weighted.selective(labels, probabilities),
    ]
    costly = [
        weighted.classwise_calibration(labels, probabilities),
        weighted.ranking(labels, probabilities),
    ]
    affordable = min(num_resamples, _MAX_PROBABILITIES // probabilities.size)
    if affordable < min(_MIN_RESAMPLES, num_resamples):
        affordable = 0
    size = len(labels)
    return estimate(cheap, size, num_resamples=num_resamples, seed=seed) | estimate(
        costly, size, num_resamples=affordable, seed=seed
    )


def estimate(
    families: Sequence[weighted.Family], num_images: int, *, num_resamples: int, seed: int
) -> dict[str, Estimate]:
    """Computes the metrics of `families`, with percentile intervals over the same resamples."""
    once = np.ones((1, num_images))
    values = {name: x[0] for compute in families for name, x in compute(once).items()}
    resampled = {name: [] for name in values}
    for weights in resamples(num_images, num_resamples, seed=seed):
        for compute in families:
            for name, x in compute(weights).items():
                resampled[name].append(x)
    return {
        name: Estimate(float(values[name]), *_interval(np.concatenate(x) if x else np.empty(0)))
        for name, x in resampled.items()
    }


def _interval(values: np.ndarray) -> tuple[float, float]:
    # A metric may be undefined on some resamples, such as those without positives.
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def resamples(num_images: int, num: int, *, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each image occurs in each of `num` resamples, float64 (R, N), in chunks."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // num_images)
    for start in range(0, num, chunk):
        rows = min(chunk, num - start)
        sampled = rng.integers(0, num_images, (rows, num_images))
        sampled += np.arange(rows)[:, None] * num_images
        counts = np.bincount(sampled.ravel(), minlength=rows * num_images)
        yield counts.reshape(rows, num_images).astype(np.float64)


def surely_above(num_right: int, num: int) -> float:
    """Lower bound of the accuracy, with 95 % confidence, if `num_right` of `num` are right.

    The exact one-sided binomial bound (Clopper and Pearson 1934). A bootstrap interval says nothing
    about data without a mistake: its resamples have none either.
    """
    return float(rule.lower_bound(num_right, num))


def confusion(found: Predictions) -> np.ndarray:
    """Number of images by (label, prediction), int64 (K, K)."""
    num_classes = found.logits.shape[1]
    pairs = found.labels.astype(np.int64) * num_classes + found.logits.argmax(1)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(found: Predictions) -> list[tuple[int, int, int]]:
    """(label, prediction, number of images) of every confused pair, the most frequent first."""
    predicted = found.logits.argmax(1)
    is_wrong = predicted != found.labels
    pairs, counts = np.unique(
        np.stack([found.labels, predicted], axis=1)[is_wrong], axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    return [(*pairs[i].tolist(), int(counts[i])) for i in order.tolist()]


def per_class(found: Predictions) -> dict[str, np.ndarray]:
    """`images`, `precision`, `recall`, `f1`, `roc_auc` and `average_precision` of each class, (K,).

    0 / 0 counts as 0, as in scikit-learn. Undefined areas are NaN, and so are recall and F1 of a
    class without images.
    """
    probabilities, predicted = found.probabilities, found.logits.argmax(1)
    hits, true, said = (
        np.bincount(chosen, minlength=found.logits.shape[1])
        for chosen in (found.labels[predicted == found.labels], found.labels, predicted)
    )
    once = np.ones((1, len(found.labels)))
    areas = {"roc_auc": weighted.roc_auc, "average_precision": weighted.average_precision}
    columns = {
        "images": true,
        "precision": hits / np.maximum(said, 1),
        "recall": np.where(true > 0, hits / np.maximum(true, 1), np.nan),
        "f1": np.where(true > 0, 2 * hits / np.maximum(said + true, 1), np.nan),
    }
    for name, area in areas.items():
        columns[name] = np.array(
            [
                area(found.labels == k, probabilities[:, k], once)[0] if count else np.nan
                for k, count in enumerate(true)
            ]
        )
    return columns


def reliability(found: Predictions) -> dict[str, np.ndarray]:
    """`images`, mean `confidence` and `accuracy` of every bin that has images (equal widths)."""
    probabilities = found.probabilities
    confidence = probabilities.max(1)
    is_right = probabilities.argmax(1) == found.labels
    bins = weighted.bin_of(confidence)
    images = np.bincount(bins, minlength=weighted.NUM_BINS)
    kept = images > 0
    return {
        "images": images[kept],
        "confidence": np.bincount(bins, confidence, weighted.NUM_BINS)[kept] / images[kept],
        "accuracy": np.bincount(bins, is_right, weighted.NUM_BINS)[kept] / images[kept],
    }


def at_temperature(found: Predictions, temperature: float) -> Predictions:
    """Returns the predictions with their logits divided by `temperature`."""
    return dataclasses.replace(found, logits=found.logits / np.float32(temperature))


def unknown_auroc(known: np.ndarray, unknown: np.ndarray, *, seed: int = 0) -> Estimate:
    """Area under the ROC curve of confidence as a test for images of known classes.

    Hendrycks and Gimpel 2017 (arXiv:1610.02136). 0.5 is chance, 1 is perfect.

    Args:
      known: Largest probability of each image from the data set trained on, (N,).
      unknown: The same for images of none of its classes, (M,).
      seed: Seed of the resamples.
    """
    is_known = np.arange(len(known) + len(unknown)) < len(known)
    scores = np.concatenate([known, unknown])

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"auroc": weighted.roc_auc(is_known, scores, weights)}

    found = estimate([compute], len(scores), num_resamples=NUM_RESAMPLES, seed=seed)
    return found["auroc"]
