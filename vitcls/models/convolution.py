"""Convolution and pooling with gradients that are also fast on CPU, where XLA's own are slow.

Measured in docs/performance.md. Other platforms keep XLA's gradients.

Shape letters: B batch, h w feature map, C D channels in and out, R = B h w.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models.dense import affine


def convolve(x: jax.Array, kernel: jax.Array, strides, *args, **kwargs) -> jax.Array:
    """`jax.lax.conv_general_dilated`; a kernel of one pixel becomes a product of matrices.

    As a convolution, XLA on CPU computes the gradient of such a kernel at a seventh of the speed
    of a product, after copying both operands into another order.
    """
    if kernel.shape[:2] != (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, *args, **kwargs)
    return _product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, h, w, C), (C, D) -> (B, h, w, D)."""
    return affine(x, kernel, None)


def _product_forwards(x: jax.Array, kernel: jax.Array):
    return affine(x, kernel, None), (x, kernel)


def _product_backwards(saved, gradient: jax.Array):
    x, kernel = saved
    by_kernel = jax.lax.platform_dependent(
        x, gradient, cpu=_kernel_gradient_on_cpu, default=_kernel_gradient
    )
    return affine(gradient, kernel.T, None), by_kernel.astype(kernel.dtype)


_product.defvjp(_product_forwards, _product_backwards)


def _kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """(B, h, w, C), (B, h, w, D) -> float32 (C, D)."""
    return jnp.einsum("bhwc,bhwd->cd", x, gradient, preferred_element_type=jnp.float32)


def _kernel_gradient_on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
    # Otherwise XLA computes the larger operand once more for this product, in another order.
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    if x.shape[-1] > gradient.shape[-1]:  # faster with the narrower one on the left
        return _rows_product(gradient, x).T
    return _rows_product(x, gradient)


def _rows_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """(B, h, w, C), (B, h, w, D) -> float32 (C, D); many rows in two halves, one for each core.

    XLA's product on CPU is not split along what it sums over.
    """
    rows = a.size // a.shape[-1]
    num_parts = 2 if rows % 2 == 0 and rows >= 8 * a.shape[-1] else 1
    a, b = (x.reshape(num_parts, -1, x.shape[-1]) for x in (a, b))
    return jnp.einsum("nrc,nrd->ncd", a, b, preferred_element_type=jnp.float32).sum(0)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3 x 3 pixels around every second one: (B, h, w, C) -> (B, h', w', C).

    The first of equal ones gets the gradient, as in torch.
    """
    return _max_pool(x)


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pads with -inf


def _max_pool_forwards(x: jax.Array):
    return _max_pool(x), x


def _max_pool_backwards(x: jax.Array, gradient: jax.Array):
    return (
        jax.lax.platform_dependent(
            x, gradient, cpu=_unpool, default=lambda x, g: jax.vjp(_max_pool, x)[1](g)[0]
        ),
    )


max_pool.defvjp(_max_pool_forwards, _max_pool_backwards)


def _unpool(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gives every window's gradient to the first of its pixels that is the largest.

    This avoids XLA's scatter. An even row of the padded image is the first row of one window and
    the last row of another; an odd row is in one window. The same holds for columns. Each of the
    four kinds of pixels is a feature map of its own, where all operations are elementwise.
    """
    h, w = gradient.shape[1:3]
    after = (2 * h + 1 - x.shape[1], 2 * w + 1 - x.shape[2])
    padding = ((0, 0), (1, after[0]), (1, after[1]), (0, 0))
    padded = jnp.pad(x, padding, constant_values=-jnp.inf)
    kinds = {(i, j): padded[:, i::2, j::2] for i in (0, 1) for j in (0, 1)}  # (B, h'+1, w'+1, C)
    places = [(i, j) for i in range(3) for j in range(3)]
    # Compared with the pooled values, the largest pixel might equal none: XLA computes x again
    # where it is used, and may round it differently there.
    largest = jnp.full(gradient.shape, -jnp.inf, x.dtype)
    first = jnp.full(gradient.shape, -1, jnp.int32)
    for place, (i, j) in enumerate(places):
        pixel = kinds[i % 2, j % 2][:, i // 2 : i // 2 + h, j // 2 : j // 2 + w]
        first = jnp.where(pixel > largest, place, first)
        largest = jnp.maximum(pixel, largest)
    sums = dict.fromkeys(kinds, 0.0)
    for place, (i, j) in enumerate(places):
        part = jnp.where(first == place, gradient, 0)
        down, right = i // 2, j // 2
        sums[i % 2, j % 2] += jnp.pad(part, ((0, 0), (down, 1 - down), (right, 1 - right), (0, 0)))
    rows = [jnp.stack([sums[i, 0], sums[i, 1]], axis=3) for i in (0, 1)]
    whole = jnp.stack(rows, axis=2).reshape(padded.shape)
    return whole[:, 1 : 1 + x.shape[1], 1 : 1 + x.shape[2]]
