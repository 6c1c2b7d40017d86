"""The dense layer against flax's: parameters, values and gradients, and what each platform runs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.models.dense import Dense, affine

X = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)


def value_and_gradients(layer: nn.Module, variables: dict, x: np.ndarray):
    def loss(variables, x):
        y = layer.apply(variables, x)
        return (y.astype(jnp.float32) ** 2).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x)
    return y, gradients


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_it_is_the_layer_of_flax(use_bias, dtype, atol):
    """Gradients of bfloat16 are up to 40, of which one rounding is up to 0.13."""
    options = dict(use_bias=use_bias, dtype=jnp.dtype(dtype), bias_init=nn.initializers.normal())
    ours, flax = Dense(24, **options), nn.Dense(24, **options)
    variables = flax.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), X)) == jax.tree.map(
        jnp.shape, variables
    )
    found, expected = (
        value_and_gradients(layer, variables, X.astype(dtype)) for layer in (ours, flax)
    )
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)

    def check(found, expected):
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        np.testing.assert_allclose(found, expected, atol=atol)

    jax.tree.map(check, found, expected)


def test_bfloat16_is_rounded_once():
    x, kernel, bias = (
        np.random.default_rng(1).normal(size=shape).astype(jnp.bfloat16)
        for shape in ((3, 7, 64), (64, 8), (8,))
    )
    y, pull = jax.vjp(jax.jit(affine), x, kernel, bias)
    gradient = np.ones(y.shape, jnp.bfloat16)
    exact = [np.asarray(array, np.float64) for array in (x, kernel, bias)]
    expected = (
        exact[0] @ exact[1] + exact[2][None, None],
        np.broadcast_to(exact[1].sum(1), x.shape),
        np.broadcast_to(exact[0].sum((0, 1))[:, None], kernel.shape),
        np.full(8, 21.0),
    )
    for found, one in zip((y, *pull(gradient)), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        # Half the distance of two neighbours is 2^-9 of their size.
        np.testing.assert_allclose(np.asarray(found, np.float64), one, rtol=2**-8, atol=1e-5)


def test_only_cpus_are_asked_for_float32():
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 5, 16), (16, 24)))

    def loss(x, kernel):
        return affine(x, kernel, None).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
    for platform, dtype in (("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(products) >= 2  # for both gradients; the value is not needed
        assert all(line.rstrip().endswith(f"x{dtype}>") for line in products)
