"""Losses: functions of logits and dense targets, one value per image; and weights of classes.

B batch, K classes. A class weight multiplies the loss of whole images. The sum over a batch is
divided by the sum of its weights, as in torch's `CrossEntropyLoss(weight=...)`. So the scale of the
weights has no effect.
"""

import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.errors import UserError

# (logits (B, K), targets (B, K)) -> float32 (B,)
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns `-sum_k targets_k log softmax(logits)_k`, float32 (B,), from (B, K) and (B, K)."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def focal(logits: jax.Array, targets: jax.Array, *, gamma: float) -> jax.Array:
    """Returns `-sum_k targets_k (1 - p_k)^gamma log p_k` with p = softmax(logits), float32 (B,).

    Lin et al. 2017, arXiv:1708.02002, equation 4, over classes and for dense targets.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    # At 0 the gradient of a power below 1 would be infinite.
    others = jnp.maximum(-jnp.expm1(log_p), 1e-12)
    return -jnp.sum(targets * others**gamma * log_p, axis=-1)


def sigmoid(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the binary cross-entropies of all classes, summed, float32 (B,).

    Beyer et al. 2020 (arXiv:2006.07159) also take the sum. With the mean over classes, as in some
    libraries, the loss is K times smaller, and SGD needs a K times larger learning rate.
    """
    logits = logits.astype(jnp.float32)
    positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(targets * positive + (1 - targets) * negative, axis=-1)


def distillation(logits: jax.Array, teacher_logits: jax.Array, *, temperature: float) -> jax.Array:
    """Returns `T^2 KL(softmax(teacher / T) || softmax(logits / T))`, float32 (B,).

    Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    log_p, log_q = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher_logits, logits)
    )
    # T^2 keeps the size of the gradient. The teacher's entropy, which has no gradient, is
    # subtracted, so that equal logits give 0.
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def make_loss(
    name: str, *, gamma: float, logit_adjustment: float, class_counts: np.ndarray
) -> Loss:
    """Returns the loss to train with.

    Args:
      name: "cross_entropy", "focal" or "sigmoid".
      gamma: See `focal`.
      logit_adjustment: tau of Menon et al. 2021, arXiv:2007.07314, equation 10: tau times the
        logarithm of a class' share of the training images is added to its logit. tau = 1 is the
        balanced softmax of Ren et al. 2020, arXiv:2007.10740, equation 4.
      class_counts: Training images of each class, int (K,); an empty class counts as one image.
    """
    loss = {
        "cross_entropy": cross_entropy,
        "focal": functools.partial(focal, gamma=gamma),
        "sigmoid": sigmoid,
    }[name]
    if not logit_adjustment:
        return loss
    counts = np.maximum(class_counts, 1)
    offset = np.float32(logit_adjustment * np.log(counts / counts.sum()))
    return lambda logits, targets: loss(logits + offset[None], targets)


def class_weights(
    how: str, class_names: tuple[str, ...], class_counts: np.ndarray, *, beta: float
) -> np.ndarray | None:
    """Returns the weight of each class, float32 (K,), or None if all are equal.

    Args:
      how: "none"; "balanced", 1 / n of a class with n images, times N / K; "effective",
        (1 - beta) / (1 - beta^n) (Cui et al. 2019, arXiv:1901.05555, equation 2); or a JSON object
        that gives every class name its weight.
      class_names: In the order of the labels.
      class_counts: Training images of each class, int (K,); an empty class counts as one image.
      beta: See "effective".

    Raises:
      UserError: the JSON object lacks a class, or has an unknown one.
    """
    counts = np.maximum(class_counts, 1)
    if how == "none":
        return None
    if how == "balanced":
        return np.float32(counts.sum() / (len(counts) * counts))
    if how == "effective":
        return np.float32((1 - beta) / (1 - beta**counts))
    table = json.loads(how)
    missing, unknown = set(class_names) - set(table), set(table) - set(class_names)
    if missing or unknown:
        raise UserError(
            f"loss.class_weights must name every class once: {sorted(missing)[:5]} are missing, "
            f"{sorted(unknown)[:5]} are not among the data's."
        )
    return np.float32([table[name] for name in class_names])
