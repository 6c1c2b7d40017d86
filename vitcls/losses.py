"""Losses: functions of logits and dense targets, one value per image."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns `-sum_k targets_k log softmax(logits)_k`, float32 (B,), from (B, K) and (B, K)."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
