"""Hugging Face's `dinov2` and `dinov2_with_registers` families.

Oquab et al. 2023 (arXiv:2304.07193); Darcet et al. 2023 (arXiv:2309.16588) add register tokens.
Checkpoints come without a head; the one that `transformers` puts on them reads the class token and
the mean of the patches.
"""

import functools
import re
from typing import Any, NamedTuple

import numpy as np

from vitcls.errors import UserError
from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained import keys
from vitcls.pretrained.families import vit_fields
from vitcls.pretrained.families.family import Family
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.keys import Key

_MAX_RATIO = 64
_MAX_REGISTERS = 1024
_PLAIN, _REGISTERS = "dinov2", "dinov2_with_registers"


def _read(fields: JsonFields, num_classes: int, family: str) -> ViTConfig:
    """What a file leaves out is as in `transformers.Dinov2Config`, or its sibling's."""
    patch_size = 16 if family == _REGISTERS else 14
    shared = vit_fields.read(fields, patch_size=patch_size, epsilon=1e-6)
    ratio = fields.number("mlp_ratio", 4)
    if not 1 / shared["width"] <= ratio <= _MAX_RATIO:
        raise fields.error("mlp_ratio", f"above 0, up to {_MAX_RATIO}")
    mlp_dim = int(shared["width"] * ratio)
    is_swiglu = fields.boolean("use_swiglu_ffn", False)
    if is_swiglu:  # two thirds, rounded up to a multiple of 8
        mlp_dim = (int(mlp_dim * 2 / 3) + 7) // 8 * 8
    prefix_tokens = ("cls",)
    if family == _REGISTERS:
        count = fields.integer("num_register_tokens", 4, at_most=_MAX_REGISTERS)
        prefix_tokens += (f"reg{count}",)
    return ViTConfig(
        family=family,
        num_classes=num_classes,
        mlp_dim=mlp_dim,
        mlp="swiglu" if is_swiglu else "mlp",
        qkv_bias=fields.boolean("qkv_bias", True),
        layer_scale=True,
        prefix_tokens=prefix_tokens,
        pool="cls_mean",
        **shared,
    )


def _read_plain(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> ViTConfig:
    del tensors
    return _read(fields, num_classes, _PLAIN)


def _read_registers(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> ViTConfig:
    del tensors
    return _read(fields, num_classes, _REGISTERS)


def _write(config: ViTConfig) -> dict[str, Any]:
    vit_fields.check_square(config)
    kind = {_PLAIN: "Dinov2", _REGISTERS: "Dinov2WithRegisters"}[config.family]
    content = {
        "architectures": [
            f"{kind}ForImageClassification" if config.num_classes else f"{kind}Model"
        ],
        "model_type": config.family,
        **vit_fields.write(config),
        "mlp_ratio": _mlp_ratio(config),
        "use_swiglu_ffn": config.mlp == "swiglu",
        "qkv_bias": config.qkv_bias,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if config.family == _REGISTERS:
        content["num_register_tokens"] = config.num_registers
    return content


def _mlp_ratio(config: ViTConfig) -> int:
    """The field is an integer, which gives a plain MLP's width or, rounded, a SwiGLU's."""
    ratio = config.mlp_dim / config.width * (1.5 if config.mlp == "swiglu" else 1)
    if config.mlp == "mlp" and not ratio.is_integer():
        raise UserError(
            f"The {config.family!r} format has MLPs whose width is a multiple of the network's; "
            f"{config.mlp_dim} is none of {config.width}."
        )
    return round(ratio)


class _Names(NamedTuple):
    """What the products of a layer are called; those of a plain MLP are fc1 and fc2."""

    qkv: tuple[str, str, str]
    output: str
    swiglu_in: tuple[str, ...]
    swiglu_out: str


_IN_FILES = _Names(
    qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    output="attention.output.dense",
    swiglu_in=("mlp.weights_in",),
    swiglu_out="mlp.weights_out",
)
_IN_MEMORY = _Names(
    qkv=tuple(f"attention.{part}_proj" for part in "qkv"),
    output="attention.o_proj",
    swiglu_in=("mlp.gate_proj", "mlp.up_proj"),
    swiglu_out="mlp.down_proj",
)


def _key_table(config: ViTConfig, prefix: str, *, names: _Names) -> list[Key]:
    embeddings = f"{prefix}embeddings"
    mlp_in, mlp_out = ("mlp.fc1",), "mlp.fc2"
    if config.mlp == "swiglu":
        mlp_in, mlp_out = names.swiglu_in, names.swiglu_out
    table = [
        Key("embeddings/cls_token", (f"{embeddings}.cls_token",), keys.SAME),
        Key("embeddings/position_embeddings", (f"{embeddings}.position_embeddings",), keys.SAME),
        *keys.patches(config, f"{embeddings}.patch_embeddings.projection"),
        *keys.norm("layernorm", f"{prefix}layernorm"),
    ]
    if config.num_registers:
        table += [Key("embeddings/register_tokens", (f"{embeddings}.register_tokens",), keys.SAME)]
    for index in range(config.depth):
        ours, theirs = f"encoder/layer_{index}", f"{prefix}encoder.layer.{index}"
        qkv, intermediate = (
            [f"{theirs}.{part}" for part in parts] for parts in (names.qkv, mlp_in)
        )
        table += [
            *keys.norm(f"{ours}/layernorm_before", f"{theirs}.norm1"),
            *keys.norm(f"{ours}/layernorm_after", f"{theirs}.norm2"),
            *keys.dense(f"{ours}/attention/qkv", *qkv, bias=config.qkv_bias),
            *keys.dense(f"{ours}/attention/output", f"{theirs}.{names.output}"),
            *keys.dense(f"{ours}/mlp/intermediate", *intermediate),
            *keys.dense(f"{ours}/mlp/output", f"{theirs}.{mlp_out}"),
            Key(f"{ours}/layer_scale_attention", (f"{theirs}.layer_scale1.lambda1",), keys.ROW),
            Key(f"{ours}/layer_scale_mlp", (f"{theirs}.layer_scale2.lambda1",), keys.ROW),
        ]
    if config.num_classes:
        table += keys.heads("classifier")
    return table


def _unused(config: ViTConfig) -> dict[str, np.ndarray]:
    """What masked patches become, in pretraining only."""
    return {"embeddings.mask_token": np.zeros((1, config.width), np.float32)}


_SHARED = dict(
    write_config=_write,
    key_table=functools.partial(_key_table, names=_IN_FILES),
    key_table_in_memory=functools.partial(_key_table, names=_IN_MEMORY),
    heads=("classifier.weight",),
    ignored=re.compile(r"embeddings\.mask_token"),
    unused=_unused,
    processor_type="BitImageProcessor",
    takes_any_size=True,
)
DINOV2 = Family(read_config=_read_plain, prefix="dinov2.", **_SHARED)
DINOV2_WITH_REGISTERS = Family(
    read_config=_read_registers, prefix="dinov2_with_registers.", antialias=True, **_SHARED
)
