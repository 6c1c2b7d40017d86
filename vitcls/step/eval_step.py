"""The evaluation and prediction steps, from plain callables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vitcls.augment.prepare import Batch
from vitcls.step import losses, metrics

PyTree = Any


def over_mirror_images(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Averages a network's logits over the images and their mirror images."""

    # Logits are averaged, not probabilities, so that records keep the network's scale. The
    # cross-entropy is convex in the logits, so it is at most the mean of the two.
    def applied(variables, images, *, train):
        both = jnp.stack([images, images[:, :, ::-1]])
        # The two passes run one after the other, so that evaluation needs no more memory.
        logits = jax.lax.map(lambda images: apply(variables, images, train=train), both)
        return jnp.mean(logits, axis=0)

    return applied


def make_eval_step(
    normalise: Callable[[jax.Array], jax.Array], apply: Callable[..., jax.Array]
) -> Callable[[PyTree, Batch], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Returns `(variables, batch) -> (sums, predictions)`, to be compiled by the caller.

    The sums are those of `metrics.batch_sums`, and `num_seen`, the rows that show an example of
    the split, usable or not. The predictions are `labels` int32 (B,), `logits`
    float32 (B, K), and `index` int32 (B,), -1 for rows that do not count.
    """

    def eval_step(variables, batch):
        targets, mask, index = batch["targets"], batch["mask"], batch["index"]
        logits = apply(variables, normalise(batch["image"]), train=False)
        loss = losses.cross_entropy(logits, targets)
        sums = metrics.batch_sums(logits, targets, loss, mask)
        sums["num_seen"] = jnp.sum((index >= 0).astype(jnp.float32))
        return sums, {
            "labels": jnp.argmax(targets, axis=-1),
            "logits": logits,
            "index": jnp.where(mask > 0, index, -1),
        }

    return eval_step


def make_predict_step(
    normalise: Callable[[jax.Array], jax.Array], apply: Callable[..., jax.Array]
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Returns `(variables, uint8 images (B, H, W, 3)) -> probabilities`, float32 (B, K)."""

    def predict_step(variables, images):
        return probabilities(apply(variables, normalise(images), train=False))

    return predict_step


def probabilities(logits: jax.Array) -> jax.Array:
    """Softmax of (B, K), nan for images with any logit that is not finite."""
    # Softmax alone would turn -infinity into a plausible 0.
    is_finite = jnp.isfinite(logits).all(axis=-1, keepdims=True)
    return jnp.where(is_finite, jax.nn.softmax(logits), jnp.nan)
