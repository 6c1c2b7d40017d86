"""Sizes of Vision Transformers, and all that tells one from another."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax

from vitcls.errors import UserError, unknown

# width, depth, mlp width, heads. S, B, L, H: Dosovitskiy et al. 2021, table 1, and Steiner et al.
# 2021 (arXiv:2106.10270), table 2, which adds Ti; Ti and S are also DeiT's (arXiv:2012.12877,
# table 1). nano is the quick start's, mu is for tests.
SIZES = {
    "mu": (32, 1, 128, 2),
    "nano": (128, 6, 512, 4),
    "ti": (192, 12, 768, 3),
    "s": (384, 12, 1536, 6),
    "b": (768, 12, 3072, 12),
    "l": (1024, 24, 4096, 16),
    "h": (1280, 32, 5120, 16),
}


def _gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, with erf as in torch; the erfc of `jax.nn.gelu` adds up to 8 % on CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


# Pool -> how many of the first tokens it reads, 0: all of them.
POOLS = {"cls": 1, "mean": 0, "cls_mean": 0, "cls_dist": 2}
# The layers that make logits, in every network: the head, and that of the distillation token.
HEADS = ("classifier", "distillation_classifier")
MLPS = ("mlp", "swiglu")
# 4096 x 4096 pixels in patches of 16; attention takes the square of it.
_MAX_PATCHES = 1 << 16
_REGISTERS = re.compile(r"reg([1-9]\d*)")
NAME = re.compile(rf"vit_({'|'.join(SIZES)})([1-9]\d*)")  # of an architecture
EXAMPLES = [f"vit_{size}{4 if size == 'nano' else 16}" for size in SIZES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Everything that decides the parameters' shapes and what is computed from them.

    Raises:
      UserError: the image is smaller than a patch or has too many, the heads do not divide the
        width, a size is not positive, or an option has an unknown value.
    """

    family: str = "vit"  # checkpoint format: names the key table and the config writer
    # height, width in pixels; those right and below of the last whole patch are left out, as by
    # the convolutions of all families (SigLIP so400m has patches of 14 pixels and images of 384)
    image_size: tuple[int, int]
    patch_size: tuple[int, int]  # height, width in pixels
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_classes: int  # 0: no head, the network returns its pooled features
    # In this order "cls", "dist" (DeiT's distillation token) and "regR" (R registers, which have no
    # position).
    prefix_tokens: tuple[str, ...] = ("cls",)
    # cls | mean (of the patches) | cls_mean (the two side by side, 2 D wide) | cls_dist (a head for
    # each of the two tokens, the logits are their mean)
    pool: str = "cls"
    mlp: str = "mlp"  # mlp | swiglu (with SiLU as its gate, not `activation`)
    activation: str = "gelu"  # a name of ACTIVATIONS
    pre_norm: bool = False  # a LayerNorm between the embeddings and the first layer
    epsilon: float = 1e-6  # of every LayerNorm
    qkv_bias: bool = True
    patch_bias: bool = True  # of the patch embedding
    final_norm: bool = True  # a LayerNorm after the last layer
    layer_scale: bool = False  # one learnt factor per channel on both branches of every layer

    def __post_init__(self):
        sizes = (*self.image_size, *self.patch_size, self.width, self.num_heads, self.mlp_dim)
        if min(sizes) < 1 or min(self.depth, self.num_classes) < 0:
            raise UserError(f"A ViT's sizes must be positive; got {self}.")
        if min(self.grid) < 1:
            raise UserError(f"image_size={self.image_size} is below a patch, {self.patch_size}.")
        if math.prod(self.grid) > _MAX_PATCHES:
            raise UserError(
                f"image_size={self.image_size} makes {math.prod(self.grid)} patches of "
                f"{self.patch_size}, more than {_MAX_PATCHES}; choose smaller images."
            )
        if self.width % self.num_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide width={self.width}; "
                "every head takes an equal share of the width."
            )
        for field, known in (("pool", POOLS), ("mlp", MLPS), ("activation", ACTIVATIONS)):
            if getattr(self, field) not in known:
                raise unknown(f"ViT {field}", getattr(self, field), known)
        for token in self.prefix_tokens:
            if token not in ("cls", "dist") and not _REGISTERS.fullmatch(token):
                raise unknown("ViT prefix token", token, ("cls", "dist", "reg4"))
        for token in ("cls", "dist"):
            if token in self.pool and token not in self.prefix_tokens:
                raise UserError(f"pool={self.pool!r} needs {token!r} among prefix_tokens.")

    def resized(self, image_size: tuple[int, int]) -> "ViTConfig":
        """The same for images of another (height, width), cut into whole patches.

        Raises:
          UserError: the patch does not divide the new size.
        """
        (height, width), (p, q) = image_size, self.patch_size
        if (height, width) != self.image_size and (height % p or width % q):
            nearest = (max(round(height / p), 1) * p, max(round(width / q), 1) * q)
            raise UserError(
                f"image_size={(height, width)} is not divisible by the patch size "
                f"{self.patch_size}; use {nearest}, for example."
            )
        return dataclasses.replace(self, image_size=(height, width))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row: (h, w)."""
        (height, width), (p, q) = self.image_size, self.patch_size
        return height // p, width // q

    @property
    def placed_tokens(self) -> tuple[str, ...]:
        """The prefix tokens that have a position: the class and the distillation token."""
        return tuple(token for token in ("cls", "dist") if token in self.prefix_tokens)

    @property
    def num_registers(self) -> int:
        matches = map(_REGISTERS.fullmatch, self.prefix_tokens)
        return sum(int(match[1]) for match in matches if match)

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches'."""
        return len(self.placed_tokens) + self.num_registers

    @property
    def num_positions(self) -> int:
        """Rows of the position embeddings: the prefix tokens' that have one, then the patches'."""
        return len(self.placed_tokens) + self.grid[0] * self.grid[1]


def vit_config(name: str, *, num_classes: int, image_size: tuple[int, int]) -> ViTConfig:
    """The config of a network named after its size and patch: `vit_b16`, `vit_nano4`.

    Args:
      name: "vit_", a key of `SIZES`, then the side of the square patch in pixels.
      num_classes: Width of the head; 0 for none.
      image_size: (height, width) in pixels, multiples of the patch.

    Raises:
      UserError: the name is unknown, or the patch does not divide the image.
    """
    match = NAME.fullmatch(name)
    if not match:
        raise unknown("architecture", name, EXAMPLES)
    width, depth, mlp_dim, num_heads = SIZES[match[1]]
    patch_size = (int(match[2]),) * 2
    config = ViTConfig(
        image_size=patch_size,  # until it is known to be a multiple
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        num_classes=num_classes,
    )
    return config.resized(image_size)
