"""Temperature, score and threshold of an answer, from the predictions for a hold-out.

N images, K classes.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.special import betaincinv, log_softmax, logsumexp, softmax

from vitcls.errors import UserError, unknown

SCORES = ("probability", "energy")
_TEMPERATURES = (0.05, 20.0)
_ERROR = 0.05  # the chance that a promise does not hold
_NUM_STARTS = 10


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is answered, and with which probabilities.

    Attributes:
      temperature: The logits are divided by it before probabilities are computed.
      score: "probability": the largest one at this temperature. "energy": the logarithm of the sum
        of the exponentials of the logits (Liu et al. 2020, arXiv:2010.03759).
      threshold: The lowest score that is answered; None: every image is rejected.
    """

    temperature: float = 1.0
    score: str = "probability"
    threshold: float | None = None

    def __post_init__(self):
        """Raises `UserError` for values that a file may have, but no rule."""
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        # bool is a subclass of int.
        for number in (self.temperature, 1 if self.threshold is None else self.threshold):
            if type(number) not in (int, float) or not math.isfinite(number):
                raise UserError("temperature and threshold must be finite numbers")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature} must be above 0")

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns the calibrated probabilities, float64 (N, K), of logits (N, K)."""
        return softmax(logits.astype(np.float64) / self.temperature, axis=1)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Returns the score of each image, float64 (N,), higher where the network is surer."""
        if self.score == "energy":
            return logsumexp(logits.astype(np.float64), axis=1)
        return self.probabilities(logits).max(axis=1)

    def is_answered(self, logits: np.ndarray) -> np.ndarray:
        """Returns which images are answered, bool (N,)."""
        threshold = math.inf if self.threshold is None else self.threshold
        return self.scores(logits) >= threshold

    def measure(self, labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """Returns the coverage, and the precision of the answered images, with 95 % intervals.

        Args:
          labels: Integers (N,).
          logits: Floats (N, K).
        """
        answered = self.is_answered(logits)
        num_answered = int(answered.sum())
        num_right = int((logits.argmax(axis=1) == labels)[answered].sum())
        return {
            "num_images": len(labels),
            "num_answered": num_answered,
            "num_right": num_right,
            "coverage": interval(num_answered, len(labels)),
            "precision": interval(num_right, num_answered),
        }


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float | None:
    """Returns the temperature, from 0.05 to 20, with the lowest log-loss on these predictions.

    Guo et al. 2017 (arXiv:1706.04599), section 4.2; logits are divided by it. Fit it on the split
    that selected the checkpoint, never on the reported one. The loss is convex in 1 / temperature.
    None if every image is right: the loss would fall with the temperature without end.
    """
    # Importing this takes a quarter of a second, which training should not wait for.
    from scipy import optimize

    if (logits.argmax(1) == labels).all():
        return None
    logits, rows = logits.astype(np.float64), np.arange(len(labels))

    def loss(inverse: float) -> float:
        return -log_softmax(logits * inverse, axis=1)[rows, labels].mean()

    low, high = _TEMPERATURES
    fitted = optimize.minimize_scalar(loss, bounds=(1 / high, 1 / low), method="bounded",
                                      options={"xatol": 1e-6})  # fmt: skip
    return float(1 / fitted.x)


def fit_rule(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    target_precision: float = 0.0,
    target_coverage: float = 0.0,
    score: str = "probability",
) -> Rule:
    """Chooses temperature and threshold on a hold-out; exactly one target is positive.

    Args:
      labels: Integers (N,).
      logits: Floats (N, K).
      target_precision: See `_num_for_precision`.
      target_coverage: Share of new images to answer, in expectation over hold-outs.
      score: A name in `SCORES`.
    """
    # Without a mistake no temperature can be fitted, and the network's own probabilities stay.
    rule = Rule(fit_temperature(labels, logits) or 1.0, score)
    ranked, counts, num_right = _rank(rule, labels, logits)
    num = len(ranked)
    if target_coverage:
        # A new image scores as high as the k-th of N with probability k / (N + 1), as in split
        # conformal prediction.
        num_answered = counts[min(num, math.ceil(target_coverage * (num + 1))) - 1]
    else:
        num_answered = _num_for_precision(counts, num_right, target_precision)
    if not num_answered:
        return rule
    lowest = ranked[num_answered - 1]
    # Scores differ in their last digits with the batch size, so a threshold lies between two.
    below = ranked[num_answered] if num_answered < num else lowest - 1e-4 * abs(lowest)
    return dataclasses.replace(rule, threshold=float((lowest + below) / 2))


def _num_for_precision(counts: np.ndarray, num_right: np.ndarray, target: float) -> int:
    """The most images to answer so that their precision is at least `target`; 0: none.

    The promise fails for at most 1 in 20 hold-outs. A threshold passes if the one-sided bound of
    Clopper and Pearson (1934) does. Choosing among thresholds is many tests, so fixed sequences
    share the error (Angelopoulos et al. 2021, arXiv:2110.01052, section 4). Each starts at a tenth
    of the images and lowers its threshold until the first failure.

    Args:
      counts: Images answered at the threshold of each rank, rising, (N,).
      num_right: How many of the first 1, 2, ..., N images are right, (N,).
      target: The precision.
    """
    num = len(counts)
    starts = np.unique(np.ceil(num * np.arange(1, _NUM_STARTS + 1) / _NUM_STARTS).astype(int))
    # A start that cannot pass even without a mistake is not a test; this looks at no prediction.
    starts = starts[lower_bound(starts, starts, error=_ERROR / _NUM_STARTS) >= target]
    starts = starts if starts.size else np.array([num])
    error, num_answered = _ERROR / len(starts), 0
    for start in starts.tolist():
        # An earlier sequence that came past this start has tested the rest.
        rank = max(start - 1, num_answered)
        while rank < num:
            answered = int(counts[rank])
            if lower_bound(num_right[answered - 1], answered, error=error) < target:
                break
            num_answered = rank = answered
    return num_answered


def highest_target(labels: np.ndarray, logits: np.ndarray, rule: Rule) -> float:
    """Returns the highest `target_precision`, in hundredths, that a rule with this score reaches.

    0 if it reaches none.
    """
    _, counts, num_right = _rank(rule, labels, logits)
    targets = (hundredths / 100 for hundredths in range(99, 0, -1))
    return next((one for one in targets if _num_for_precision(counts, num_right, one)), 0.0)


def _rank(
    rule: Rule, labels: np.ndarray, logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scores, highest first; for each the number at least as high; and how many are right."""
    scores, is_right = rule.scores(logits), logits.argmax(axis=1) == labels
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # Equal scores are answered together.
    counts = np.searchsorted(-ranked, -ranked, side="right")
    return ranked, counts, np.cumsum(is_right[order])


def lower_bound(num_right: Any, num: Any, *, error: float = _ERROR) -> np.ndarray:
    """Returns the exact one-sided lower bound of a share (Clopper and Pearson 1934).

    Args:
      num_right: Integers (...).
      num: Integers (...), above 0.
      error: The chance that the share is below the bound.
    """
    num_right, num = np.asarray(num_right, np.float64), np.asarray(num, np.float64)
    return np.where(
        num_right > 0, betaincinv(np.maximum(num_right, 1), num - num_right + 1, error), 0.0
    )


def interval(num_right: int, num: int) -> dict[str, float | None]:
    """Returns a share with its exact 95 % interval (Clopper and Pearson 1934).

    The share of no images is None, from 0 to 1.
    """
    if not num:
        return {"value": None, "low": 0.0, "high": 1.0}
    low = lower_bound(num_right, num, error=_ERROR / 2)
    high = 1 - lower_bound(num - num_right, num, error=_ERROR / 2)
    return {"value": num_right / num, "low": float(low), "high": float(high)}


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Returns the chance that a known image has a higher score than an unknown one; ties half."""
    ranked = np.sort(unknown)
    wins = np.searchsorted(ranked, known, "left") + np.searchsorted(ranked, known, "right")
    return float(wins.mean() / (2 * len(unknown)))
