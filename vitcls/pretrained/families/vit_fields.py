"""The fields that the config.json of every Vision Transformer has, under the same names."""

from typing import Any

from vitcls.errors import UserError
from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained.files.json_fields import JsonFields

ACTIVATIONS = {  # their name -> ours; the first of several is the one we write
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Far above any ViT that exists; a config beyond them is broken or hostile.
MAX_PIXELS, MAX_WIDTH, MAX_DEPTH = 8192, 1 << 16, 256


def read(
    fields: JsonFields, *, patch_size: int = 16, activation: str = "gelu", epsilon: float
) -> dict[str, Any]:
    """Reads the shared arguments of a `ViTConfig`, with these defaults where they differ.

    Raises:
      UserError: a value is not supported.
    """
    if fields.integer("num_channels", 3, at_most=MAX_WIDTH) != 3:
        raise fields.error("num_channels", "3")
    return dict(
        image_size=fields.pair("image_size", 224, at_most=MAX_PIXELS),
        patch_size=fields.pair("patch_size", patch_size, at_most=MAX_PIXELS),
        width=fields.integer("hidden_size", 768, at_most=MAX_WIDTH),
        depth=fields.integer("num_hidden_layers", 12, at_most=MAX_DEPTH),
        num_heads=fields.integer("num_attention_heads", 12, at_most=MAX_WIDTH),
        activation=fields.choice("hidden_act", activation, ACTIVATIONS),
        epsilon=fields.number("layer_norm_eps", epsilon),
    )


def write(config: ViTConfig) -> dict[str, Any]:
    """The same fields for a config.json."""
    return {
        "image_size": _square(config.image_size),
        "patch_size": _square(config.patch_size),
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.epsilon,
    }


def activation_name(ours: str) -> str:
    """Their name of an activation."""
    return next(name for name, value in ACTIVATIONS.items() if value == ours)


def _square(size: tuple[int, int]) -> int | list[int]:
    """One integer where both are the same, which is all that older readers take."""
    return size[0] if size[0] == size[1] else list(size)


def check_square(config: ViTConfig) -> None:
    """Raises `UserError` unless image and patch are square, as some of torch's networks need."""
    if config.image_size[0] != config.image_size[1] or config.patch_size[0] != config.patch_size[1]:
        raise UserError(
            f"The {config.family!r} format has square images only, not {config.image_size}; "
            "choose a square image size, such as data.image_size=(224, 224)."
        )
