"""Attention by every kernel: the same numbers; who is asked for it where."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.errors import UserError
from vitcls.models import attention


def test_attention_is_scaled_dot_product_attention():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 7, 3, 8)).astype(np.float32)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        args = [x.astype(dtype) for x in (q[:, :4], k, v)]
        out = jax.jit(attention.attention)(*args)
        assert out.dtype == dtype
        expected = jax.jit(jax.nn.dot_product_attention)(*args)
        np.testing.assert_allclose(
            np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=tolerance
        )


def test_attention_head_by_head_is_that_of_all_heads():
    arrays = np.random.default_rng(0).normal(size=(4, 2, 3, 7, 8)).astype(np.float32)

    def value_and_gradients(attend, dtype):
        q, k, v, out = (x.astype(dtype) for x in arrays)
        value, pull = jax.vjp(jax.jit(attend), q, k, v)
        return value, pull(out)

    expected = value_and_gradients(attention._attend, jnp.float32)
    for dtype, atol in ((jnp.float32, 1e-6), (jnp.bfloat16, 5e-2)):
        found = value_and_gradients(attention._attend_head_by_head, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
        found = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), found, expected)


def test_only_tpus_attend_head_by_head():
    q = jax.ShapeDtypeStruct((2, 7, 3, 8), jnp.bfloat16)

    def loss(q, k, v):
        return (attention.attention(q, k, v).astype(jnp.float32) ** 2).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q)
    tpu, cpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu"))
    assert tpu.count("stablehlo.while") == 2  # forwards and backwards
    all_scores, scores_of_one = (
        re.compile(rf"dot_general .* -> tensor<{shape}xf32>") for shape in ("2x3x7x7", "2x7x7")
    )
    assert scores_of_one.search(tpu) and not all_scores.search(tpu)
    assert "stablehlo.while" not in cpu and all_scores.search(cpu)


@pytest.mark.parametrize("num_tokens", [7, 8])
def test_attention_of_padded_tokens_is_that_without(num_tokens):
    arrays = np.random.default_rng(0).normal(size=(4, 2, num_tokens, 3, 8)).astype(np.float32)
    padded = functools.partial(attention._attend_padded, implementation="xla")
    results = []
    for attend in (padded, attention.attention):
        value, pull = jax.vjp(jax.jit(attend), *arrays[:3])
        results.append((value, pull(arrays[3])))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *results)


@pytest.mark.parametrize("num_tokens", [196, 197])
def test_cudnn_is_asked_forwards_and_backwards(num_tokens, monkeypatch):
    """What is lowered for a GPU, as jax would where it finds cuDNN 9.12 and an H100."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    found = types.SimpleNamespace(cudnn_get_version=lambda: 91200)
    monkeypatch.setattr(cudnn, "cuda_versions", found)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: float(least) <= 9)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda other: other == "9.0")
    q = jax.ShapeDtypeStruct((2, num_tokens, 3, 64), jnp.bfloat16)

    def loss(q, k, v):
        out = attention.attention(q, k, v, kernel="cudnn")
        assert out.shape == q.shape
        return (out.astype(jnp.float32) ** 2).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    called = re.findall(r"custom_call @(__cudnn\S+?)\(", text)
    assert sorted(called) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    last = jax.ShapeDtypeStruct((2, 1, 3, 64), jnp.bfloat16)  # of the last layer one token asks
    text = jax.jit(loss).trace(last, q, q).lower(lowering_platforms=("cuda",)).as_text()
    assert "cudnn" not in text


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "message"),
    [
        ("cpu", None, "bfloat16", "needs an NVIDIA GPU .* and here is it; use xla"),
        ("gpu", "7.5", "bfloat16", "compute capability 8.0 or more"),
        ("gpu", "gfx942", "bfloat16", "needs an NVIDIA GPU"),
        ("gpu", "9.0", "float32", "computes in bfloat16, not in float32; set model.dtype"),
        ("gpu", "9.0", "bfloat16", None),
    ],
)
def test_cudnn_is_refused_where_it_cannot_be(platform, capability, dtype, message):
    device = types.SimpleNamespace(platform=platform, device_kind="it")
    if capability:
        device.compute_capability = capability
    if message is None:
        return attention.check_cudnn(device, dtype)
    with pytest.raises(UserError, match=message):
        attention.check_cudnn(device, dtype)


def test_three_products_are_the_thirds_of_one():
    arrays = [
        np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for shape in ((2, 7, 8), (8, 12), (12,))
    ]
    for bias in (arrays[2], None):
        found, expected = (
            jax.value_and_grad(lambda *args, f=f: sum((y**2).sum() for y in f(*args)), (0, 1))(
                *arrays[:2], bias
            )
            for f in (attention._three_products, attention._one_product)
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
