"""Hugging Face's `vit` family: its config, and the names of its tensors."""

from pathlib import Path
from typing import Any

from vitcls.errors import UserError
from vitcls.models.vit import ViTConfig
from vitcls.pretrained import keys
from vitcls.pretrained.json_fields import JsonFields
from vitcls.pretrained.keys import Key

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
HAS_IMAGE_SIZE = True  # in a config.json
# Far above any ViT that exists; a config beyond them is broken or hostile.
_MOST_PIXELS, _MOST_WIDTH, _MOST_DEPTH = 8192, 1 << 16, 256


def read_config(path: Path, *, num_classes: int) -> ViTConfig:
    """Reads a `config.json`; what it leaves out is as in `transformers.ViTConfig`.

    Args:
      path: The file.
      num_classes: Width of the head that the weights have, 0 for none.

    Raises:
      UserError: a value is not supported.
    """
    fields = JsonFields(path)
    if fields.integer("num_channels", 3, most=_MOST_WIDTH) != 3:
        raise fields.error("num_channels", "3")
    return ViTConfig(
        family="vit",
        image_size=fields.pair("image_size", 224, most=_MOST_PIXELS),
        patch_size=fields.pair("patch_size", 16, most=_MOST_PIXELS),
        width=fields.integer("hidden_size", 768, most=_MOST_WIDTH),
        depth=fields.integer("num_hidden_layers", 12, most=_MOST_DEPTH),
        num_heads=fields.integer("num_attention_heads", 12, most=_MOST_WIDTH),
        mlp_dim=fields.integer("intermediate_size", 3072, most=_MOST_WIDTH),
        num_classes=num_classes,
        activation=fields.choice("hidden_act", "gelu", ACTIVATIONS),
        epsilon=fields.number("layer_norm_eps", 1e-12),
        qkv_bias=fields.boolean("qkv_bias", True),
    )


def config_to_json(config: ViTConfig) -> dict[str, Any]:
    """The content of a `config.json`, all but the class names.

    Raises:
      UserError: the network has parts that the format has no fields for.
    """
    plain = ViTConfig(
        **{name: getattr(config, name) for name in _FORMAT_FIELDS}, num_classes=config.num_classes
    )
    if config != plain:
        raise UserError(f"The 'vit' format cannot describe this network: {config}.")
    ours = list(ACTIVATIONS.values())
    return {
        "architectures": ["ViTForImageClassification" if config.num_classes else "ViTModel"],
        "model_type": "vit",
        "image_size": _square(config.image_size),
        "patch_size": _square(config.patch_size),
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": list(ACTIVATIONS)[ours.index(config.activation)],
        "layer_norm_eps": config.epsilon,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


# What the format can say; a network that differs in anything else does not fit into it.
_FORMAT_FIELDS = (
    "image_size",
    "patch_size",
    "width",
    "depth",
    "num_heads",
    "mlp_dim",
    "activation",
    "epsilon",
    "qkv_bias",
)


def _square(size: tuple[int, int]) -> int | list[int]:
    """One integer where both are the same, which is all that older readers take."""
    return size[0] if size[0] == size[1] else list(size)


def has_head(names: set[str]) -> bool:
    """Whether these tensors are a `ViTForImageClassification`'s rather than a `ViTModel`'s."""
    return "classifier.weight" in names


def ignored(names: set[str]) -> set[str]:
    """The tensors among `names` that classification has no use for: the pooler's."""
    return {name for name in names if name.removeprefix("vit.").startswith("pooler.dense.")}


def key_table(config: ViTConfig) -> list[Key]:
    """Every parameter of `config`'s network with the tensors it is stored as.

    With a head the tensors are named as in a `ViTForImageClassification`, whose backbone is
    `vit.`; without one as in a bare `ViTModel`.
    """
    prefix = "vit." if config.num_classes else ""
    table = [
        Key("embeddings/cls_token", (f"{prefix}embeddings.cls_token",), keys.SAME),
        Key(
            "embeddings/position_embeddings",
            (f"{prefix}embeddings.position_embeddings",),
            keys.SAME,
        ),
        Key(
            "embeddings/patch_embedding/kernel",
            (f"{prefix}embeddings.patch_embeddings.projection.weight",),
            keys.patch_kernel(config.patch_size),
        ),
        Key(
            "embeddings/patch_embedding/bias",
            (f"{prefix}embeddings.patch_embeddings.projection.bias",),
            keys.SAME,
        ),
        *_norm("layernorm", f"{prefix}layernorm"),
    ]
    for index in range(config.depth):
        ours, theirs = f"encoder/layer_{index}", f"{prefix}encoder.layer.{index}"
        qkv = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        table += [
            *_norm(f"{ours}/layernorm_before", f"{theirs}.layernorm_before"),
            *_norm(f"{ours}/layernorm_after", f"{theirs}.layernorm_after"),
            *_dense(f"{ours}/attention/qkv", *qkv, bias=config.qkv_bias),
            *_dense(f"{ours}/attention/output", f"{theirs}.attention.output.dense"),
            *_dense(f"{ours}/mlp/intermediate", f"{theirs}.intermediate.dense"),
            *_dense(f"{ours}/mlp/output", f"{theirs}.output.dense"),
        ]
    if config.num_classes:
        table += _dense("classifier", "classifier")
    return table


def _norm(ours: str, theirs: str) -> list[Key]:
    return [
        Key(f"{ours}/scale", (f"{theirs}.weight",), keys.SAME),
        Key(f"{ours}/bias", (f"{theirs}.bias",), keys.SAME),
    ]


def _dense(ours: str, *theirs: str, bias: bool = True) -> list[Key]:
    kernel = Key(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), keys.LINEAR)
    if not bias:
        return [kernel]
    return [kernel, Key(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), keys.BIAS)]
