"""Metrics as functions of how often each image counts: once in the data, at random in a resample.

Each takes `weights` (R, N), non-negative, and returns (R,): row r is the metric of data in which
image i occurs weights[r, i] times. Ones give the metric itself, multinomial weights its bootstrap.
So a number and its interval always have the same definition.

N images, K classes, R resamples, M bins.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import sparse
from scipy.special import log_softmax

Metric = Callable[[np.ndarray], np.ndarray]
Family = Callable[[np.ndarray], Mapping[str, np.ndarray]]

NUM_BINS = 15  # of all calibration errors, as in Guo et al. 2017 (arXiv:1706.04599)


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Top / bottom, NaN where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def _mean(values: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    """The mean (R,) of the counted `values` (R, K); NaN if none counts."""
    return _divide(np.where(is_counted, values, 0).sum(1), is_counted.sum(1))


def ranks(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Number of classes ranked before the label, int (N,); ties as argmax breaks them."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    is_before = (logits > own) | (
        (logits == own) & (np.arange(logits.shape[1])[None] < labels[:, None])
    )
    return is_before.sum(1)


def means(labels: np.ndarray, logits: np.ndarray) -> Family:
    """Metrics that are a mean over images.

    `accuracy`; `top5_accuracy`, with more than 5 classes; `log_loss`, exact from the logits and
    not clipped; `brier`, the squared distance from the one-hot label summed over classes, from 0
    to 2 (Brier 1950).
    """
    log_probs = log_softmax(logits.astype(np.float64), axis=1)
    at_label = np.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    rank = ranks(labels, logits)
    values = {
        "accuracy": rank == 0,
        "top5_accuracy": rank < 5,
        "log_loss": -at_label,
        "brier": np.exp(2 * log_probs).sum(1) - 2 * np.exp(at_label) + 1,
    }
    if logits.shape[1] <= 5:  # top-5 would always be right
        del values["top5_accuracy"]
    columns = np.stack(list(values.values()), axis=1).astype(np.float64)

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        averages = (weights @ columns) / weights.sum(1, keepdims=True)
        return dict(zip(values, averages.T, strict=True))

    return compute


def by_class(labels: np.ndarray, logits: np.ndarray) -> Family:
    """`balanced_accuracy`, and precision, recall and F1 as macro, micro and weighted mean.

    Defined as in scikit-learn: 0 / 0 counts as 0. The macro mean is over the classes that occur as
    a label or a prediction; the weighted mean weights classes by their labels. `balanced_accuracy`
    is the mean recall of the classes that occur as a label. With one label per image the three
    micro means equal the accuracy.
    """
    num_classes, positions = logits.shape[1], np.arange(len(labels))
    predicted = logits.argmax(1)

    def one_hot(chosen, rows):
        values = np.ones(len(rows))
        return sparse.csr_matrix((values, (rows, chosen)), (len(labels), num_classes))

    is_right = np.flatnonzero(predicted == labels)
    counts_of = sparse.hstack(
        [one_hot(labels[is_right], is_right), one_hot(predicted, positions),
         one_hot(labels, positions)], format="csc",
    )  # fmt: skip

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        hits, said, true = np.split(weights @ counts_of, 3, axis=1)  # (R, K) each
        ratios = {
            "precision": np.nan_to_num(_divide(hits, said)),
            "recall": np.nan_to_num(_divide(hits, true)),
            "f1": np.nan_to_num(_divide(2 * hits, said + true)),
        }
        result = {"balanced_accuracy": _mean(ratios["recall"], true > 0)}
        total = weights.sum(1)
        for name, values in ratios.items():
            result[f"macro_{name}"] = _mean(values, (said > 0) | (true > 0))
            result[f"micro_{name}"] = hits.sum(1) / total
            result[f"weighted_{name}"] = (values * true).sum(1) / total
        return result

    return compute


def bin_of(probabilities: np.ndarray, *, equal_mass: bool = False) -> np.ndarray:
    """The bin of each probability, int (N,), below `NUM_BINS`; as scikit-learn's calibration_curve.

    Bins are open to the left. Bins of equal mass have about the same number of images, unless many
    images share a probability. Resampling does not move them.
    """
    edges = np.linspace(0, 1, NUM_BINS + 1)
    if equal_mass:
        edges = np.percentile(probabilities, edges * 100)
    return np.searchsorted(edges[1:-1], probabilities)


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> Family:
    """Expected calibration errors of the largest probability.

    `ece`, over bins of equal width (Guo et al. 2017, arXiv:1706.04599, equation 3), and
    `ece_equal_mass` (Nixon et al. 2019, arXiv:1904.01685): the mean over images of the distance
    between the mean confidence and the accuracy of their bin.
    """
    confidence = probabilities.max(1)
    gaps = confidence - (probabilities.argmax(1) == labels)

    def gaps_of(bins: np.ndarray):
        return sparse.csc_matrix((gaps, (np.arange(len(gaps)), bins)), (len(gaps), NUM_BINS))

    gaps_by = {
        "ece": gaps_of(bin_of(confidence)),
        "ece_equal_mass": gaps_of(bin_of(confidence, equal_mass=True)),
    }

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(1)
        return {name: np.abs(weights @ by).sum(1) / total for name, by in gaps_by.items()}

    return compute


def classwise_calibration(labels: np.ndarray, probabilities: np.ndarray) -> Family:
    """`classwise_ece`: calibration error of each class' probability, the mean over classes.

    Bins of equal width; Kull et al. 2019 (arXiv:1910.12656), equation 2.
    """
    num_classes = probabilities.shape[1]

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = np.zeros(len(weights))
        for k in range(num_classes):
            gaps = probabilities[:, k] - (labels == k)
            one_hot = sparse.csc_matrix(
                (gaps, (np.arange(len(gaps)), bin_of(probabilities[:, k]))), (len(gaps), NUM_BINS)
            )
            total += np.abs(weights @ one_hot).sum(1)
        return {"classwise_ece": total / num_classes / weights.sum(1)}

    return compute


def _steps(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images by falling score, int (N,), and the positions where runs of equal scores end."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    return order, np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(scores) - 1)


def _running(weights: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Cumulative sums along the rows, at `ends`."""
    return np.cumsum(weights, axis=1)[:, ends]


def roc_auc(is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (R,): the chance that a positive scores higher, ties counting half.

    NaN without positives or without negatives.
    """
    order, ends = _steps(scores)
    ordered, is_positive = weights[:, order], is_positive[order]
    true = _running(ordered * is_positive, ends)
    false = _running(ordered * ~is_positive, ends)
    before = np.diff(true, axis=1, prepend=0)  # positives of each step
    # Each positive of a step beats the negatives below it, and half of those with equal score.
    below = false[:, -1:] - false + np.diff(false, axis=1, prepend=0) / 2
    return _divide((before * below).sum(1), true[:, -1] * false[:, -1])


def average_precision(
    is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Mean precision over the positives (R,), not interpolated; NaN if there are none."""
    order, ends = _steps(scores)
    ordered = weights[:, order]
    true = _running(ordered * is_positive[order], ends)
    precision = np.nan_to_num(_divide(true, _running(ordered, ends)))
    return _divide((np.diff(true, axis=1, prepend=0) * precision).sum(1), true[:, -1])


def ranking(labels: np.ndarray, probabilities: np.ndarray) -> Family:
    """`roc_auc` and `average_precision`: each class against the rest, the mean over classes.

    Classes without positives or without negatives do not count: both are undefined for them.
    """

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        sums = {"roc_auc": 0.0, "average_precision": 0.0}
        num = np.zeros(len(weights))
        for k in np.unique(labels):
            is_positive = labels == k
            auc = roc_auc(is_positive, probabilities[:, k], weights)
            precision = average_precision(is_positive, probabilities[:, k], weights)
            is_defined = ~np.isnan(auc)
            sums["roc_auc"] += np.where(is_defined, auc, 0)
            sums["average_precision"] += np.where(is_defined, precision, 0)
            num += is_defined
        return {name: _divide(total + np.zeros(len(num)), num) for name, total in sums.items()}

    return compute


def risk_coverage(
    is_wrong: np.ndarray, confidence: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The share of answered images and the share of mistakes among them, (R, steps).

    Steps go by falling confidence. Images of equal confidence are answered together, as with a
    threshold.
    """
    order, ends = _steps(confidence)
    answered = _running(weights[:, order], ends)
    mistakes = _running(weights[:, order] * is_wrong[order], ends)
    return answered / answered[:, -1:], np.nan_to_num(_divide(mistakes, answered))


def selective(labels: np.ndarray, probabilities: np.ndarray) -> Family:
    """`aurc`: the risk averaged over all coverages, by largest probability; 0 is best.

    Geifman et al. 2019 (arXiv:1805.08206), section 3.
    """
    is_wrong, confidence = probabilities.argmax(1) != labels, probabilities.max(1)

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        coverage, risk = risk_coverage(is_wrong, confidence, weights)
        return {"aurc": (np.diff(coverage, axis=1, prepend=0) * risk).sum(1)}

    return compute
