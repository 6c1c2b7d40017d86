"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), one network for many families.

Checkpoint families differ by the values of a `ViTConfig`, never by code paths named after them.

Shape letters: B batch, H W pixels, h w patch grid, N tokens, D width, M mlp width, K classes,
A heads, d width of one head.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.errors import UserError
from vitcls.models.attention import Thirds, attention
from vitcls.models.dense import Dense
from vitcls.models.remat import call_layer
from vitcls.models.vit_config import ACTIVATIONS, HEADS, POOLS, ViTConfig


def dropout(
    x: jax.Array, keys: jax.Array | None, *, site: int, rate: float, shape: tuple[int, ...]
) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
      x: (B, ...).
      keys: (B,) typed keys, one per sample, so that a sample's mask does not depend on its place
        in the batch nor on how the batch is split (not so for `rbg` keys, which `vmap` mixes).
        None: returns `x`.
      site: Number of this place in the network; every place samples its own mask.
      rate: Probability of a zero.
      shape: Shape of one sample's mask, broadcast against `x.shape[1:]`: ones drop whole samples.
    """
    if keys is None or rate == 0:
        return x

    def keep_one(key):
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, shape)

    return jnp.where(jax.vmap(keep_one)(keys), x / (1 - rate), 0)


def drop_patches(
    x: jax.Array, keys: jax.Array | None, *, site: int, rate: float, num_prefix: int
) -> jax.Array:
    """Leaves out the share `rate` of the patches (PatchDropout, Liu et al. 2022, arXiv:2208.07220).

    Every sample keeps as many patches, at least one, others of its own choice, in no order.

    Args:
      x: (B, N, D) tokens, which have their positions.
      keys: As for `dropout`.
      site: As for `dropout`.
      rate: Share to leave out.
      num_prefix: Tokens at the front that always stay.
    """
    num_patches = x.shape[1] - num_prefix
    num_kept = max(round(num_patches * (1 - rate)), 1)
    if keys is None or num_kept == num_patches:
        return x

    def keep_some(patches, key):
        kept = jax.random.permutation(jax.random.fold_in(key, site), num_patches)[:num_kept]
        # Unique: the gradient then needs no atomic additions.
        return patches.at[kept].get(unique_indices=True, mode="promise_in_bounds")

    prefix, patches = jnp.split(x, [num_prefix], axis=1)
    return jnp.concatenate([prefix, jax.vmap(keep_some)(patches, keys)], axis=1)


class Embeddings(nn.Module):
    """Pixels -> tokens: prefix tokens, then patches in row-major order, with their positions."""

    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        (h, w), (p, q) = config.grid, config.patch_size
        batch = images.shape[0]
        # A convolution whose stride is its size, as one product: (B, H, W, 3) -> (B, h w, p q 3).
        patches = images[:, : h * p, : w * q].astype(self.dtype).reshape(batch, h, p, w, q, 3)
        patches = patches.swapaxes(2, 3).reshape(batch, h * w, p * q * 3)
        embed = Dense(
            config.width, dtype=self.dtype, use_bias=config.patch_bias, name="patch_embedding"
        )
        tokens = embed(patches)
        for token in reversed(config.placed_tokens):
            param = self.param(f"{token}_token", nn.initializers.zeros, (1, 1, config.width))
            tokens = _prepend(param, tokens)
        shape = (1, config.num_positions, config.width)
        positions = self.param("position_embeddings", nn.initializers.normal(0.02), shape)
        tokens = tokens + positions.astype(self.dtype)
        if config.num_registers:
            shape = (1, config.num_registers, config.width)
            registers = self.param("register_tokens", nn.initializers.normal(0.02), shape)
            placed, patches = jnp.split(tokens, [len(config.placed_tokens)], axis=1)
            tokens = jnp.concatenate([placed, _prepend(registers, patches)], axis=1)
        return tokens  # (B, N, D)


def _prepend(token: jax.Array, tokens: jax.Array) -> jax.Array:
    """(1, T, D) in front of every sample of (B, N, D) -> (B, T + N, D)."""
    shape = (tokens.shape[0], *token.shape[1:])  # not `len`: batches may have symbolic sizes
    token = jnp.broadcast_to(token.astype(tokens.dtype), shape)
    return jnp.concatenate([token, tokens], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention; only the first `num_outputs` tokens ask (None: all do).

    For `kernel` see `attention`.
    """

    config: ViTConfig
    dtype: jnp.dtype
    kernel: str
    num_outputs: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        # For a square kernel, such as each third of the fused one, this is Glorot's initializer.
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        options = dict(dtype=self.dtype, kernel_init=init)
        qkv = Thirds(3 * config.width, use_bias=config.qkv_bias, name="qkv", **options)(x)
        heads = (*x.shape[:2], config.num_heads, config.width // config.num_heads)
        q, k, v = (part.reshape(heads) for part in qkv)  # (B, N, A, d)
        q = q[:, : self.num_outputs]  # (B, Q, A, d)
        self.sow("intermediates", "q", q)  # kept only when the caller makes the collection mutable
        self.sow("intermediates", "k", k)
        self.sow("intermediates", "v", v)
        out = attention(q, k, v, kernel=self.kernel)  # (B, Q, A, d)
        out = out.reshape(x.shape[0], -1, config.width)  # (B, Q, D)
        return Dense(config.width, name="output", **options)(out)


class Mlp(nn.Module):
    """Two products with an activation between, on each token by itself."""

    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        init = nn.initializers.xavier_uniform()
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=init)
        if config.mlp == "swiglu":  # Shazeer 2020, arXiv:2002.05202: gate and values in one product
            gate, values = jnp.split(dense(2 * config.mlp_dim, name="intermediate")(x), 2, axis=-1)
            x = jax.nn.silu(gate) * values
        else:
            x = ACTIVATIONS[config.activation](dense(config.mlp_dim, name="intermediate")(x))
        return dense(config.width, name="output")(x)


class Layer(nn.Module):
    """A pre-norm Transformer layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Dropout acts on the output of both branches, as in Hugging Face's ViT; stochastic depth
    (Huang et al. 2016, arXiv:1603.09382) then drops a sample's whole branch.
    """

    config: ViTConfig
    dtype: jnp.dtype
    index: int  # place in the encoder
    dropout_rate: float
    drop_path_rate: float  # of this layer
    attention: str
    num_outputs: int | None = None  # compute only the first of the tokens

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        norm = functools.partial(_layer_norm, self.config, self.dtype)
        attend = Attention(
            self.config, self.dtype, self.attention, self.num_outputs, name="attention"
        )
        attended = attend(norm(name="layernorm_before")(x))
        x = x[:, : self.num_outputs] + self._regularized(attended, keys, "attention")
        mapped = Mlp(self.config, self.dtype, name="mlp")(norm(name="layernorm_after")(x))
        return x + self._regularized(mapped, keys, "mlp")

    def _regularized(self, x: jax.Array, keys: jax.Array | None, branch: str) -> jax.Array:
        """A branch's output, (B, N, D), as it is added to the residual stream."""
        if self.config.layer_scale:
            shape = (1, 1, self.config.width)
            scale = self.param(f"layer_scale_{branch}", nn.initializers.constant(1e-5), shape)
            x = x * scale.astype(self.dtype)
        site = 1 + 4 * self.index + (2 if branch == "mlp" else 0)  # 0 is the embeddings'
        x = dropout(x, keys, site=site, rate=self.dropout_rate, shape=x.shape[1:])
        return dropout(x, keys, site=site + 1, rate=self.drop_path_rate, shape=(1, 1))


class Encoder(nn.Module):
    """The stack of layers. The last one computes only what is pooled."""

    config: ViTConfig
    dtype: jnp.dtype
    dropout_rate: float
    drop_path_rate: float  # of the last layer; rises linearly from 0 at the first
    attention: str
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        depth = self.config.depth
        for index in range(depth):
            # Nothing reads the other tokens after the last layer: without them a 12-layer network
            # saves one fifteenth of its work and computes the very same logits and gradients.
            last = index == depth - 1
            layer = Layer(
                self.config,
                self.dtype,
                index,
                self.dropout_rate,
                self.drop_path_rate * index / max(depth - 1, 1),
                self.attention,
                num_outputs=POOLS[self.config.pool] or None if last else None,
                name=f"layer_{index}",
            )
            x = call_layer(layer, x, keys, remat=self.remat)
        return x


class ViT(nn.Module):
    """Images -> logits. Parameters are float32; `dtype` is that of products and residual stream.

    LayerNorms, softmax, pooled features and logits are computed in float32 for every `dtype`.
    """

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32
    dropout_rate: float = 0.0  # of the embeddings and of every branch
    drop_path_rate: float = 0.0  # of the last layer; linear in depth from 0 at the first
    patch_dropout_rate: float = 0.0  # see `drop_patches`
    attention: str = "xla"  # or "cudnn": its implementation, see `attention`
    remat: str = "none"  # or a key of `remat.POLICIES`: what each layer keeps to go backwards

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> jax.Array:
        """Computes logits, or features.

        Args:
          images: (B, H, W, 3) float, normalised, of the config's image size.
          train: Whether dropout, stochastic depth and PatchDropout act.
          keys: (B,) typed keys, one per sample; needed only when `train` and a rate is above 0.

        Returns:
          (B, K) float32 logits; with `num_classes=0` (B, D) pooled features (2 D for pools of two).

          With `mutable=["intermediates"]` every layer also gives its attention's `q`, `k` and `v`,
          (B, N, A, d); the last layer's q has only the tokens that the pool reads.

        Raises:
          UserError: images of another size, or no keys where they are needed.
        """
        config = self.config
        check_image_size(images, config.image_size)
        rates = (self.dropout_rate, self.drop_path_rate, self.patch_dropout_rate)
        if train and keys is None and any(rates):
            raise UserError(
                "Dropout, stochastic depth and PatchDropout in training need keys, one per sample."
            )
        keys = keys if train else None
        x = Embeddings(config, self.dtype, name="embeddings")(images)
        x = drop_patches(
            x,
            keys,
            site=1 + 4 * config.depth,  # after the layers'
            rate=self.patch_dropout_rate,
            num_prefix=config.num_prefix,
        )
        if config.pre_norm:
            x = _layer_norm(config, self.dtype, name="layernorm_pre")(x)
        x = dropout(x, keys, site=0, rate=self.dropout_rate, shape=x.shape[1:])
        options = (self.dropout_rate, self.drop_path_rate, self.attention, self.remat)
        x = Encoder(config, self.dtype, *options, name="encoder")(x, keys)
        norm = _layer_norm(config, jnp.float32, name="layernorm") if config.final_norm else _float32
        x = pool(x, norm, config)
        if config.num_classes == 0:
            return x
        # A zero kernel: the first loss is ln K, and the first gradient leaves the backbone alone.
        head = functools.partial(Dense, config.num_classes, kernel_init=nn.initializers.zeros)
        if config.pool != "cls_dist":
            return head(name=HEADS[0])(x)
        cls, dist = jnp.split(x, 2, axis=-1)
        return (head(name=HEADS[0])(cls) + head(name=HEADS[1])(dist)) / 2


def check_image_size(images: jax.Array, image_size: tuple[int, int]) -> None:
    """Raises `UserError` unless images (B, H, W, 3) have the size (height, width)."""
    if images.shape[1:] != (*image_size, 3):
        raise UserError(
            f"Got images of shape {images.shape[1:]}, this network takes {(*image_size, 3)}; load "
            "it with another image_size or resize them."
        )


def pool(x: jax.Array, norm: Callable[[jax.Array], jax.Array], config: ViTConfig) -> jax.Array:
    """(B, N, D) tokens -> (B, D) or (B, 2 D) float32 features; normalises what it reads."""
    if num_tokens := POOLS[config.pool]:
        return norm(x[:, :num_tokens]).reshape(x.shape[0], num_tokens * config.width)
    x = norm(x)
    mean = x[:, config.num_prefix :].mean(axis=1)
    return mean if config.pool == "mean" else jnp.concatenate([x[:, 0], mean], axis=-1)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _layer_norm(config: ViTConfig, dtype: jnp.dtype, *, name: str) -> nn.LayerNorm:
    """Statistics in float32, the variance as E[x^2] - E[x]^2.

    A token's mean is far below its spread, so nothing cancels; the two-pass variance has a backward
    pass that XLA fuses badly on CPU (a whole Ti/16 step takes twice as long).
    """
    return nn.LayerNorm(config.epsilon, dtype=dtype, use_fast_variance=True, name=name)
