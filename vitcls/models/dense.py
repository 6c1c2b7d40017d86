"""The dense layer, in bfloat16 also fast on CPU.

Processors that multiply bfloat16 numbers add the products up in float32. XLA on CPU has them do so
only where float32 is asked for; otherwise it converts both operands to float32 first, at half the
speed. Sums of bfloat16 numbers are also slow (docs/performance.md). Other platforms keep XLA's
own products and gradients.

Shape letters: D features in, E features out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dense(nn.Dense):
    """`nn.Dense`, with the same parameters, computed by `affine`."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        return affine(*nn.dtypes.promote_dtype(inputs, kernel, bias, dtype=self.dtype))


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """(..., D), (D, E), (E,) -> (..., E), all of one dtype; no bias: None."""
    return (_affine_of_bfloat16 if x.dtype == jnp.bfloat16 else _affine)(x, kernel, bias)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = x @ kernel
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


@jax.custom_vjp
def _affine_of_bfloat16(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    return _forwards(x, kernel, bias)[0]


def _forwards(x: jax.Array, kernel: jax.Array, bias: jax.Array | None):
    args = (x, kernel, bias)
    return jax.lax.platform_dependent(*args, cpu=_affine_on_cpu, default=_affine), args


def _backwards(saved, gradient: jax.Array):
    return jax.lax.platform_dependent(
        *saved,
        gradient,
        cpu=_gradients_on_cpu,
        default=lambda *args: jax.vjp(_affine, *args[:3])[1](args[3]),
    )


_affine_of_bfloat16.defvjp(_forwards, _backwards)


def _affine_on_cpu(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        y += jnp.reshape(bias.astype(jnp.float32), (1,) * (y.ndim - 1) + (-1,))
    return y.astype(x.dtype)


def _gradients_on_cpu(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, gradient: jax.Array):
    rows, gradient_rows = (a.reshape(-1, a.shape[-1]) for a in (x, gradient))
    by_bias = None if bias is None else gradient_rows.astype(jnp.float32).sum(0).astype(bias.dtype)
    return (
        _affine_on_cpu(gradient, kernel.T, None),
        _affine_on_cpu(rows.T, gradient_rows, None),
        by_bias,
    )
