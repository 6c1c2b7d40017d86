"""Products and pooling of `vitcls.models.convolution`, with their gradients, against torch's."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vitcls.models.convolution import _kernel_gradient, convolve, max_pool

LAYOUT = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)


def from_torch(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("shape", "features"),
    [((2, 8, 8, 4), 6), ((2, 8, 8, 6), 4), ((1, 3, 5, 7), 2), ((3, 2, 2, 40), 50)],
    ids=["widens", "narrows", "odd", "few rows"],
)
def test_a_kernel_of_one_pixel_is_torchs_convolution(shape, features, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    kernel = rng.standard_normal((1, 1, shape[-1], features), np.float32)
    image, weight = to_torch(x), torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    expected = torch.nn.functional.conv2d(image, weight, stride=stride)
    gradient = rng.standard_normal(from_torch(expected).shape, np.float32)
    expected.backward(torch.tensor(gradient.transpose(0, 3, 1, 2).copy()))

    out, vjp = jax.vjp(lambda *a: convolve(*a, (stride, stride), "VALID", **LAYOUT), x, kernel)
    by_x, by_kernel = vjp(jnp.asarray(gradient))
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, from_torch(expected), **close)
    np.testing.assert_allclose(by_x, from_torch(image.grad), **close)
    np.testing.assert_allclose(by_kernel, weight.grad.numpy().transpose(2, 3, 1, 0), **close)


def test_other_platforms_compute_the_same_gradient_of_a_kernel():
    rng = np.random.default_rng(1)
    x, gradient = (rng.standard_normal((2, 8, 8, n), np.float32) for n in (4, 6))
    kernel = jnp.zeros((1, 1, 4, 6))
    (found,) = jax.vjp(lambda k: convolve(x, k, (1, 1), "VALID", **LAYOUT), kernel)[1](gradient)
    np.testing.assert_allclose(found[0, 0], _kernel_gradient(x, gradient), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(9, 12), (8, 7), (2, 5), (1, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_pooling_is_torchs(size, ties):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, *size, 3), np.float32)
    if ties:
        x = x.round()  # windows have several largest pixels
    image = to_torch(x)
    expected = torch.nn.functional.max_pool2d(image, 3, stride=2, padding=1)
    gradient = rng.standard_normal(from_torch(expected).shape, np.float32)
    expected.backward(torch.tensor(gradient.transpose(0, 3, 1, 2).copy()))

    pooled, vjp = jax.vjp(max_pool, jnp.asarray(x))
    np.testing.assert_array_equal(pooled, from_torch(expected))
    np.testing.assert_allclose(vjp(jnp.asarray(gradient))[0], from_torch(image.grad), atol=1e-6)


def test_gradient_of_pooling_survives_that_what_is_pooled_is_computed_twice():
    """Optimised code computes a normalisation again where it is used, and rounds it differently."""
    rng = np.random.default_rng(3)
    x, gradient = (rng.standard_normal((4, *size, 8), np.float32) for size in ((8, 12), (4, 6)))

    def normalise(x):
        mean, variance = (f(x, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        return jax.nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-5) * 1.3 + 0.1)

    def loss(x):
        return (max_pool(normalise(x)) * gradient).sum()

    # The other tests' XLA flags switch off what this one is about.
    optimised = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    if "fusion_emitters" in os.environ["XLA_FLAGS"]:
        optimised["xla_cpu_use_fusion_emitters"] = True
    found = jax.jit(jax.grad(loss), compiler_options=optimised)(x)
    normalised, vjp = jax.vjp(jax.jit(normalise), x)
    expected = vjp(jax.vjp(max_pool, normalised)[1](jnp.asarray(gradient))[0])[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
