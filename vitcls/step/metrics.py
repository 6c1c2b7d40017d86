"""Classification metrics from sums: every example counts once, the division comes last.

B batch, K classes.
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.errors import UserError

Name = TypeVar("Name")


def batch_sums(
    logits: jax.Array, targets: jax.Array, loss: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """Returns the sums over a batch that `summarise` needs.

    Args:
      logits: float32 (B, K).
      targets: float32 (B, K); the label is the largest entry.
      loss: float32 (B,).
      weights: float32 (B,), 1 for an example and 0 for padding.

    Returns:
      float32 scalars `num_examples`, `loss`, `correct`, `top5_correct`; float32 (K,)
      `true_positives`, `predicted`, `labelled`. Counts of one batch are exact in float32.
    """
    # Padding rows may hold a nan, and 0 * nan is nan.
    loss = jnp.where(weights > 0, loss * weights, 0.0)
    labels = jnp.argmax(targets, axis=-1)
    # XLA may compute logits again where they are used, and round them differently there. A label
    # would then not equal itself, and not be behind itself.
    logits = jax.lax.optimization_barrier(logits)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # The rank is the number of classes before the label; ties are in the order of argmax. This form
    # also keeps every row with a nan outside the top.
    classes = jnp.arange(logits.shape[-1])[None]
    behind = (logits < label_logits) | ((logits == label_logits) & (classes >= labels[:, None]))
    rank = jnp.sum(~behind, axis=-1)
    num_classes = logits.shape[-1]
    labels_one_hot = jax.nn.one_hot(labels, num_classes) * weights[:, None]
    correct = (rank == 0) * weights
    predictions = jnp.argmax(logits, axis=-1)
    return {
        "num_examples": jnp.sum(weights),
        "loss": jnp.sum(loss),
        "correct": jnp.sum(correct),
        "top5_correct": jnp.sum((rank < 5) * weights),
        "true_positives": jnp.sum(labels_one_hot * correct[:, None], axis=0),
        "predicted": jnp.sum(jax.nn.one_hot(predictions, num_classes) * weights[:, None], axis=0),
        "labelled": jnp.sum(labels_one_hot, axis=0),
    }


def add_sums(total: dict[str, np.ndarray] | None, new: dict[str, np.ndarray]) -> dict:
    """Adds one batch's sums in float64, where counts stay exact."""
    new = {name: np.asarray(value, np.float64) for name, value in new.items()}
    return new if total is None else {name: total[name] + new[name] for name in total}


def summarise(
    sums: dict[str, np.ndarray], *, train_counts: np.ndarray | None = None
) -> dict[str, float]:
    """Returns the metrics of a whole split.

    `macro_*` are means over the classes that occur as a label or as a prediction, a ratio 0 / 0
    counting as 0, and `balanced_accuracy` is the mean recall of those that occur as a label, as
    scikit-learn defines them. `top5_accuracy` only with more than 5 classes.

    Args:
      sums: Sums of all batches, see `batch_sums`.
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
