"""Convolutions and pooling with the gradients that XLA computes slowly.

Shape letters: B batch, h w feature map, C D channels in and out, R = B h w.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def convolve(x: jax.Array, kernel: jax.Array, strides, *args, **kwargs) -> jax.Array:
    """`jax.lax.conv_general_dilated`, of which a kernel of one pixel is a product of matrices."""
    if kernel.shape[:2] != (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, *args, **kwargs)
    return _product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, h, w, C), (C, D) -> (B, h, w, D)."""
    return x @ kernel


def _forwards(x, kernel):
    return x @ kernel, (x, kernel)


def _backwards(saved, gradient):
    x, kernel = saved
    # Otherwise XLA computes the gradient once more, in another order, for the second product.
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, gradient)]
    return gradient @ kernel.T, _kernel_gradient(*rows).astype(kernel.dtype)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3 x 3 pixels at every second one: (B, h, w, C) -> (B, h', w', C).

    The gradient goes to the first of equal ones, as in torch.
    """
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pads with -inf


def _pool(x):
    pooled = max_pool(x)
    return pooled, (x, pooled)


def _unpool(saved, gradient):
    x, pooled = saved
    rows, columns = pooled.shape[1:3]
    size = 2 * rows + 2, 2 * columns + 2
    padding = [(0, 0), *((1, n - m - 1) for n, m in zip(size, x.shape[1:3], strict=True)), (0, 0)]
    padded = jnp.pad(x, padding, constant_values=-jnp.inf)
    # Row 2 i + 1, of those padded, is in window i, row 2 i in i - 1 and i; as are columns.
    phases = {(r, c): padded[:, r::2, c::2] for r in (0, 1) for c in (0, 1)}  # (B, h'+1, w'+1, C)
    total = {phase: 0.0 for phase in phases}
    is_free = jnp.ones(pooled.shape, bool)
    for r in range(3):
        for c in range(3):
            phase = phases[r % 2, c % 2][:, r // 2 : r // 2 + rows, c // 2 : c // 2 + columns]
            is_first = is_free & (phase == pooled)
            is_free &= ~is_first
            part = jnp.where(is_first, gradient, 0)
            placed = ((0, 0), (r // 2, 1 - r // 2), (c // 2, 1 - c // 2), (0, 0))
            total[r % 2, c % 2] += jnp.pad(part, placed)
    lines = [jnp.stack([total[r, 0], total[r, 1]], axis=3) for r in (0, 1)]
    joined = jnp.stack(lines, axis=2).reshape(*padded.shape)
    return (joined[:, 1 : 1 + x.shape[1], 1 : 1 + x.shape[2]],)


max_pool.defvjp(_pool, _unpool)
_product.defvjp(_forwards, _backwards)


def _kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """(R, C), (R, D) -> x^T gradient, float32 (C, D)."""
    if x.shape[1] > gradient.shape[1]:
        return _kernel_gradient(gradient, x).T
    n = 2 if len(x) % 2 == 0 and len(x) >= 8 * x.shape[1] else 1
    if n == 1:
        return jax.lax.dot_general(
            x, gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
    parts = [tensor.reshape(n, -1, tensor.shape[1]) for tensor in (x, gradient)]
    return jnp.einsum("nrc,nrd->ncd", *parts, preferred_element_type=jnp.float32).sum(0)
