"""The metrics of a whole split, and the score by which one of several is chosen.

K classes.
"""

import math
from typing import TypeVar

import numpy as np

from vitcls.errors import UserError

Name = TypeVar("Name")


def summarise(
    sums: dict[str, np.ndarray], *, train_counts: np.ndarray | None = None
) -> dict[str, float]:
    """Returns the metrics of a whole split.

    `macro_*` are means over the classes that occur as a label or as a prediction, a ratio 0 / 0
    counting as 0, and `balanced_accuracy` is the mean recall of those that occur as a label, as
    scikit-learn defines them. `top5_accuracy` only with more than 5 classes.

    Args:
      sums: Sums of all batches, see `step.metrics.batch_sums`.
      train_counts: Training images of each class, int (K,). With them `head_accuracy`,
        `medium_accuracy` and `tail_accuracy` are the mean recall of the classes with more than
        100, 20 to 100, and fewer than 20 (Liu et al. 2019, arXiv:1904.05160, section 5), each
        where the split has such classes.
    """
    num_examples = sums["num_examples"]
    seen = (sums["labelled"] > 0) | (sums["predicted"] > 0)
    hits = sums["true_positives"][seen]
    predicted, labelled = sums["predicted"][seen], sums["labelled"][seen]
    is_label = sums["labelled"] > 0
    recall = sums["true_positives"] / np.maximum(sums["labelled"], 1)
    summary = {
        "num_examples": int(num_examples),
        "loss": sums["loss"] / num_examples,
        "accuracy": sums["correct"] / num_examples,
        "balanced_accuracy": np.mean(recall[is_label]),
        "top5_accuracy": sums["top5_correct"] / num_examples,
        "macro_precision": np.mean(hits / np.maximum(predicted, 1)),
        "macro_recall": np.mean(hits / np.maximum(labelled, 1)),
        "macro_f1": np.mean(2 * hits / (predicted + labelled)),
    }
    # With 5 classes or fewer, every answer would be right.
    if len(seen) <= 5:
        del summary["top5_accuracy"]
    if train_counts is not None:
        groups = {
            "head": train_counts > 100,
            "medium": (train_counts >= 20) & (train_counts <= 100),
            "tail": train_counts < 20,
        }
        for name, members in groups.items():
            if (members & is_label).any():
                summary[f"{name}_accuracy"] = np.mean(recall[members & is_label])
    return {
        name: value if name == "num_examples" else float(value) for name, value in summary.items()
    }


def select_score(summary: dict[str, float], metric: str) -> float:
    """Returns the score of a summary by `metric`; higher is better.

    Raises:
      UserError: the summary lacks the metric.
    """
    if metric not in summary:
        raise UserError(
            f"The metric {metric!r}, which is to choose, does not exist here; there are "
            f"{', '.join(name for name in summary if name != 'num_examples')}."
        )
    # A network whose answers are nan is right only by chance, so its score is the lowest.
    if not all(map(math.isfinite, summary.values())):
        return -math.inf
    return -summary[metric] if metric == "loss" else summary[metric]


def best_name(found: dict[Name, dict[str, float]], metric: str) -> Name:
    """Returns the name with the best summary. The lower loss breaks ties, then the order.

    Raises:
      UserError: none of them is finite.
    """
    scores = {name: select_score(summary, metric) for name, summary in found.items()}
    finite = [name for name in found if scores[name] > -math.inf]
    if not finite:
        raise UserError(
            f"None of {', '.join(map(str, found))} can be chosen: the {metric} of all of them is "
            "not finite. Their weights are damaged, or too large."
        )
    return max(finite, key=lambda name: (scores[name], -found[name]["loss"]))
