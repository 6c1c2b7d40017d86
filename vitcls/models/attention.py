"""Scaled dot-product attention, and the layer that makes its q, k and v.

TPUs compute both another way, with the same result; docs/performance.md says why.

Shape letters: B batch, N tokens, Q queries, D width, A heads, d width of one head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.errors import UserError
from vitcls.models.dense import Dense, affine

KERNELS = ("xla", "cudnn")  # implementations of attention


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, kernel: str = "xla") -> jax.Array:
    """Scaled dot-product attention, its softmax in float32; the one place to swap the kernel.

    Args:
      kernel: "xla", or "cudnn" for flash attention on NVIDIA's GPUs, which keeps no scores. It
        needs bfloat16 arrays, and is used only where all tokens are queries.
      q: (B, Q, A, d) queries.
      k: (B, N, A, d) keys.
      v: (B, N, A, d) values.

    Returns:
      (B, Q, A, d), in the dtype of `q`.
    """
    if kernel == "cudnn" and q.shape == k.shape:
        return _attend_padded(q, k, v, implementation="cudnn")
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # heads first: a seventh off a CPU step
    q = q * q.shape[-1] ** -0.5
    if q.shape[2] == 1:  # the scores of one query are few
        out = _attend(q, k, v)
    else:
        out = jax.lax.platform_dependent(q, k, v, tpu=_attend_head_by_head, default=_attend)
    return out.swapaxes(1, 2)


def check_cudnn(device: jax.Device, dtype: str) -> None:
    """Raises `UserError` where the device cannot compute attention by "cudnn", or not in `dtype`.

    `jax.nn.dot_product_attention` takes 16-bit floats, and compute capability 8.0 or more.
    """
    capability = getattr(device, "compute_capability", "0")  # NVIDIA's GPUs have "9.0", for example
    if device.platform != "gpu" or not capability[:1].isdigit() or float(capability) < 8:
        raise UserError(
            "cudnn (model.attention) needs an NVIDIA GPU of compute capability 8.0 or more, and "
            f"here is {device.device_kind}; use xla."
        )
    if dtype != "bfloat16":
        raise UserError(
            f"cudnn (model.attention) computes in bfloat16, not in {dtype}; set model.dtype to it, "
            "or use xla."
        )


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(..., Q, d), (..., N, d), (..., N, d) -> (..., Q, d); the queries are scaled."""
    scores = jnp.einsum("...qd,...nd->...qn", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...qn,...nd->...qd", weights, v)


def _attend_padded(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str) -> jax.Array:
    """`attention` of (B, N, A, d) by `jax.nn`, which trains with cuDNN on even N only (jax 0.10).

    One more token makes an odd number even; lengths mask it, and it is left out of the result.
    """
    num_tokens, lengths = q.shape[1], None
    if num_tokens % 2:
        lengths = jnp.full(q.shape[:1], num_tokens, jnp.int32)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v,
        query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation,
    )  # fmt: skip
    return out[:, :num_tokens]


def _attend_head_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`_attend` of (B, A, ., d), one head after the other, and once more to go backwards.

    The scores of one head stay in a TPU's fast memory (128 MiB), and are not kept. Those of all
    heads are written to the slow one and read five times: two fifths of all that a step moves.
    """
    attend = jax.checkpoint(_attend, prevent_cse=False)  # a loop's rounds are not merged anyway
    heads = tuple(x.swapaxes(0, 1) for x in (q, k, v))
    return jax.lax.map(lambda head: attend(*head), heads).swapaxes(0, 1)


class Thirds(Dense):
    """A dense layer whose output is three arrays side by side: (B, N, D) -> 3 x (B, N, E).

    TPUs make each by a product of its own, as they can then write it in the order that attention
    reads, and copy no parts of a larger one.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        args = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return jax.lax.platform_dependent(*args, tpu=_three_products, default=_one_product)


def _one_product(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, ...]:
    # Split, not indexed: the gradients are then concatenated instead of padded and added.
    return tuple(jnp.split(affine(x, kernel, bias), 3, axis=-1))


def _three_products(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, ...]:
    biases = [None] * 3 if bias is None else jnp.split(bias, 3)
    return tuple(map(affine, [x] * 3, jnp.split(kernel, 3, axis=-1), biases))
