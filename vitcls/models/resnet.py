"""ResNet v1.5 (He et al. 2016, arXiv:1512.03385; the stride is in the 3 x 3 convolution).

Padding, activations and names follow Hugging Face's `resnet`, whose checkpoints load unchanged.

Shape letters: B batch, H W pixels, h w feature map, C channels, D width of the features, K classes.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.errors import UserError, unknown
from vitcls.models.convolution import convolve, max_pool
from vitcls.models.remat import call_layer
from vitcls.models.vit import check_image_size
from vitcls.models.vit_config import ACTIVATIONS, HEADS

# Layer type, layers per stage, channels per stage. He et al. 2016, table 1; mu is for tests.
SIZES = {
    "resnet_mu": ("bottleneck", (1, 1), (16, 32)),
    "resnet18": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "resnet101": ("bottleneck", (3, 4, 23, 3), (256, 512, 1024, 2048)),
    "resnet152": ("bottleneck", (3, 8, 36, 3), (256, 512, 1024, 2048)),
}
LAYER_TYPES = ("basic", "bottleneck")
REDUCTION = 4  # a bottleneck's channels inside are a quarter of those outside
# torch's defaults, which Hugging Face keeps; torch calls this momentum 0.1.
MOMENTUM, EPSILON = 0.9, 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Everything that decides the parameters' shapes and what is computed from them.

    Raises:
      UserError: a size is not positive, the stages do not agree, or an option is unknown.
    """

    family: str = "resnet"  # checkpoint format: names the key table and the config writer
    image_size: tuple[int, int]  # height, width in pixels; no parameter depends on it
    embedding_size: int = 64  # channels after the first convolution
    hidden_sizes: tuple[int, ...]  # channels after each stage
    depths: tuple[int, ...]  # layers in each stage
    layer_type: str  # basic: two 3 x 3 convolutions | bottleneck: 1 x 1, 3 x 3, 1 x 1
    num_classes: int  # 0: no head, the network returns its pooled features
    activation: str = "relu"  # a name of ACTIVATIONS: after the first convolution and every layer
    downsample_in_first_stage: bool = False  # its first layer then also has stride 2
    downsample_in_bottleneck: bool = False  # True: the stride is in the first 1 x 1, as in v1

    def __post_init__(self):
        if len(self.hidden_sizes) != len(self.depths) or not self.depths:
            raise UserError(
                f"A ResNet's hidden_sizes={self.hidden_sizes} and depths={self.depths} must name "
                "the same stages."
            )
        for field, known in (("layer_type", LAYER_TYPES), ("activation", ACTIVATIONS)):
            if getattr(self, field) not in known:
                raise unknown(f"ResNet {field}", getattr(self, field), known)
        narrowest = REDUCTION if self.layer_type == "bottleneck" else 1
        sizes = (*self.image_size, self.embedding_size, *self.depths)
        if min(sizes) < 1 or min(self.hidden_sizes) < narrowest or self.num_classes < 0:
            raise UserError(
                "A ResNet's sizes must be positive, and the hidden_sizes of bottlenecks at least "
                f"{REDUCTION}; got {self}."
            )

    def resized(self, image_size: tuple[int, int]) -> "ResNetConfig":
        """The same for images of another (height, width)."""
        return dataclasses.replace(self, image_size=tuple(image_size))


def resnet_config(name: str, *, num_classes: int, image_size: tuple[int, int]) -> ResNetConfig:
    """The config of a network named after its number of layers: `resnet18`, `resnet50`.

    Args:
      name: A key of `SIZES`.
      num_classes: Width of the head; 0 for none.
      image_size: (height, width) in pixels.

    Raises:
      UserError: the name is unknown.
    """
    if name not in SIZES:
        raise unknown("architecture", name, SIZES)
    layer_type, depths, hidden_sizes = SIZES[name]
    return ResNetConfig(
        image_size=tuple(image_size),
        embedding_size=8 if name == "resnet_mu" else 64,
        hidden_sizes=hidden_sizes,
        depths=depths,
        layer_type=layer_type,
        num_classes=num_classes,
    )


class ConvLayer(nn.Module):
    """A convolution without bias, its BatchNorm and perhaps an activation: B h w C -> B h' w' C'.

    The running variance moves towards the batch's biased variance (divided by n); torch's moves
    towards the unbiased one (divided by n - 1), n being the pixels of the whole global batch.
    """

    features: int
    kernel_size: int
    stride: int
    activation: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, *, use_batch_statistics: bool
    ) -> jax.Array:
        x = nn.Conv(
            self.features,
            (self.kernel_size,) * 2,
            strides=self.stride,
            # As much on every side, as torch pads: "SAME" with stride 2 pads the end only.
            padding=self.kernel_size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            conv_general_dilated=convolve,
            name="convolution",
        )(x)
        # Statistics and normalisation are float32 for every `dtype`. Under jit they are those
        # of the global batch, without the images that `mask` (B,) leaves out. The variance is
        # E[x^2] - E[x]^2: one pass, and one all-reduce.
        x = nn.BatchNorm(
            use_running_average=not use_batch_statistics,
            momentum=MOMENTUM,
            epsilon=EPSILON,
            dtype=self.dtype,
            use_fast_variance=True,
            name="normalization",
        )(x, mask=None if mask is None else mask[:, None, None, None])
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


class Layer(nn.Module):
    """A residual layer: activation(branch(x) + shortcut(x)), (B, h, w, C) -> (B, h', w', C')."""

    config: ResNetConfig
    dtype: jnp.dtype
    features: int
    stride: int

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, *, use_batch_statistics: bool
    ) -> jax.Array:
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = ConvLayer(self.features, 1, self.stride, None, self.dtype, name="shortcut")(
                x, mask, use_batch_statistics=use_batch_statistics
            )
        for index, (features, kernel_size, stride, activation) in enumerate(self._branch()):
            x = ConvLayer(
                features, kernel_size, stride, activation, self.dtype, name=f"conv_layer_{index}"
            )(x, mask, use_batch_statistics=use_batch_statistics)
        return ACTIVATIONS[self.config.activation](x + shortcut)

    def _branch(self) -> list[tuple[int, int, int, str | None]]:
        """Features, kernel size, stride and activation of each convolution of the branch.

        Inside a branch the activation is always ReLU, as in Hugging Face's code.
        """
        features, stride = self.features, self.stride
        if self.config.layer_type == "basic":
            return [(features, 3, stride, "relu"), (features, 3, 1, None)]
        inner = features // REDUCTION
        strides = (stride, 1) if self.config.downsample_in_bottleneck else (1, stride)
        return [
            (inner, 1, strides[0], "relu"),
            (inner, 3, strides[1], "relu"),
            (features, 1, 1, None),
        ]


class Stage(nn.Module):
    """Layers of the same width; the first may halve the feature map."""

    config: ResNetConfig
    dtype: jnp.dtype
    index: int
    remat: str

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, *, use_batch_statistics: bool
    ) -> jax.Array:
        config = self.config
        stride = 2 if self.index > 0 or config.downsample_in_first_stage else 1
        features = config.hidden_sizes[self.index]
        for index in range(config.depths[self.index]):
            layer_stride = stride if index == 0 else 1
            layer = Layer(config, self.dtype, features, layer_stride, name=f"layer_{index}")
            x = call_layer(
                layer, x, mask, remat=self.remat, use_batch_statistics=use_batch_statistics
            )
        return x


class Encoder(nn.Module):
    """All stages."""

    config: ResNetConfig
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, *, use_batch_statistics: bool
    ) -> jax.Array:
        for index in range(len(self.config.depths)):
            x = Stage(self.config, self.dtype, index, self.remat, name=f"stage_{index}")(
                x, mask, use_batch_statistics=use_batch_statistics
            )
        return x


class ResNet(nn.Module):
    """Images -> logits. Parameters are float32; `dtype` is that of convolutions and feature maps.

    BatchNorm's statistics, pooled features and logits are float32 for every `dtype`. The running
    statistics are the collection `batch_stats`, float32.
    """

    config: ResNetConfig
    dtype: jnp.dtype = jnp.float32
    # True: in training normalise with the batch's statistics and move the running ones. False: use
    # the running ones and leave them; scales and biases are trained all the same.
    train_batch_norm: bool = True
    remat: str = "none"  # or a key of `remat.POLICIES`: what each layer keeps to go backwards

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        keys: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Computes logits, or features.

        Args:
          images: (B, H, W, 3) float, normalised, of the config's image size.
          train: Whether BatchNorm uses and updates statistics, if `train_batch_norm`; then apply
            with `mutable=["batch_stats"]`.
          keys: Not used: nothing here is random.
          mask: (B,) bool, which images BatchNorm's batch statistics are of; None: all. At least one
            must be.

        Returns:
          (B, K) float32 logits; with `num_classes=0` (B, D) float32 pooled features.

        Raises:
          UserError: images of another size.
        """
        config = self.config
        check_image_size(images, config.image_size)
        use_batch_statistics = train and self.train_batch_norm
        x = ConvLayer(config.embedding_size, 7, 2, config.activation, self.dtype, name="embedder")(
            images.astype(self.dtype), mask, use_batch_statistics=use_batch_statistics
        )
        x = max_pool(x)
        encoder = Encoder(config, self.dtype, self.remat, name="encoder")
        x = encoder(x, mask, use_batch_statistics=use_batch_statistics)
        x = x.astype(jnp.float32).mean(axis=(1, 2))  # (B, D)
        if config.num_classes == 0:
            return x
        # A zero kernel: the first loss is ln K, and the first gradient leaves the backbone alone.
        return nn.Dense(config.num_classes, kernel_init=nn.initializers.zeros, name=HEADS[0])(x)
