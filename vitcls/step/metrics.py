"""Classification metrics from sums: every example counts once, the division comes last.

B batch, K classes.
"""

import jax
import jax.numpy as jnp
import numpy as np


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
