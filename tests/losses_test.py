"""Losses equal optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitcls import losses


def test_cross_entropy_equals_optax_on_dense_targets():
    logits = 10 * jax.random.normal(jax.random.key(0), (16, 7))
    targets = jax.nn.softmax(jax.random.normal(jax.random.key(1), (16, 7)))
    np.testing.assert_allclose(
        losses.cross_entropy(logits, targets),
        optax.softmax_cross_entropy(logits, targets),
        rtol=1e-6,
    )


def test_cross_entropy_of_a_zero_head_is_ln_k():
    np.testing.assert_allclose(
        losses.cross_entropy(jnp.zeros((3, 10)), jnp.eye(10)[:3]), np.log(10), rtol=1e-6
    )
