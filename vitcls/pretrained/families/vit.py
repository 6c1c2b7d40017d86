"""Hugging Face's `vit`, `deit` and `vit_mae` families, whose tensors have the same names.

DeiT (Touvron et al. 2021, arXiv:2012.12877) adds a distillation token, and in half of its
checkpoints a head for it: predictions are then the mean of both heads' logits.

Checkpoints of masked images, SimMIM's (Xie et al. 2022, arXiv:2111.09886) and MAE's (He et al.
2022, arXiv:2111.06377), are read as encoders: classification uses neither the decoder nor the
token that stands for masked patches. MAE's fixed positions are stored like learned ones.
"""

import functools
import re
from typing import Any, NamedTuple

from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained import keys
from vitcls.pretrained.families import vit_fields
from vitcls.pretrained.families.family import Family
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.keys import Key

_TWO_HEADS = "DeiTForImageClassificationWithTeacher"


def _read(fields: JsonFields, num_classes: int, **values: Any) -> ViTConfig:
    """What a file leaves out is as in `transformers.ViTConfig`, which DeiT's equals."""
    return ViTConfig(
        num_classes=num_classes,
        mlp_dim=fields.integer("intermediate_size", 3072, at_most=vit_fields.MAX_WIDTH),
        qkv_bias=fields.boolean("qkv_bias", True),
        **vit_fields.read(fields, epsilon=1e-12),
        **values,
    )


def _read_vit(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> ViTConfig:
    del tensors
    return _read(fields, num_classes, family="vit")


def _read_deit(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> ViTConfig:
    if tensors is None:
        two_heads = fields.any("architectures") == [_TWO_HEADS]
    else:
        two_heads = "distillation_classifier.weight" in tensors
    pool = "cls_dist" if two_heads else "cls"
    return _read(fields, num_classes, family="deit", prefix_tokens=("cls", "dist"), pool=pool)


def _write(config: ViTConfig) -> dict[str, Any]:
    kind = {"vit": "ViT", "deit": "DeiT"}[config.family]
    architecture = f"{kind}ForImageClassification" if config.num_classes else f"{kind}Model"
    return {
        "architectures": [_TWO_HEADS if config.pool == "cls_dist" else architecture],
        "model_type": config.family,
        **vit_fields.write(config),
        "intermediate_size": config.mlp_dim,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


class _Names(NamedTuple):
    """What a layer is called, and its products in it."""

    layer: str
    qkv: tuple[str, str, str]
    output: str
    mlp_in: str
    mlp_out: str


_IN_FILES = _Names(
    layer="encoder.layer",
    qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    output="attention.output.dense",
    mlp_in="intermediate.dense",
    mlp_out="output.dense",
)
_IN_MEMORY = _Names(
    layer="layers",
    qkv=tuple(f"attention.{part}_proj" for part in "qkv"),
    output="attention.o_proj",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
)


def _key_table(config: ViTConfig, prefix: str, *, names: _Names) -> list[Key]:
    embeddings = f"{prefix}embeddings"
    table = [
        Key("embeddings/cls_token", (f"{embeddings}.cls_token",), keys.SAME),
        Key("embeddings/position_embeddings", (f"{embeddings}.position_embeddings",), keys.SAME),
        *keys.patches(config, f"{embeddings}.patch_embeddings.projection"),
        *keys.norm("layernorm", f"{prefix}layernorm"),
    ]
    if "dist" in config.prefix_tokens:
        table += [Key("embeddings/dist_token", (f"{embeddings}.distillation_token",), keys.SAME)]
    for index in range(config.depth):
        ours, theirs = f"encoder/layer_{index}", f"{prefix}{names.layer}.{index}"
        qkv = [f"{theirs}.{part}" for part in names.qkv]
        table += [
            *keys.norm(f"{ours}/layernorm_before", f"{theirs}.layernorm_before"),
            *keys.norm(f"{ours}/layernorm_after", f"{theirs}.layernorm_after"),
            *keys.dense(f"{ours}/attention/qkv", *qkv, bias=config.qkv_bias),
            *keys.dense(f"{ours}/attention/output", f"{theirs}.{names.output}"),
            *keys.dense(f"{ours}/mlp/intermediate", f"{theirs}.{names.mlp_in}"),
            *keys.dense(f"{ours}/mlp/output", f"{theirs}.{names.mlp_out}"),
        ]
    if config.num_classes and config.pool == "cls_dist":
        table += keys.heads("cls_classifier", "distillation_classifier")
    elif config.num_classes:
        table += keys.heads("classifier")
    return table


_SHARED = dict(
    write_config=_write,
    key_table=functools.partial(_key_table, names=_IN_FILES),
    key_table_in_memory=functools.partial(_key_table, names=_IN_MEMORY),
    ignored=re.compile(r"pooler\.dense\.(weight|bias)|embeddings\.mask_token|decoder\..*"),
)
VIT = Family(
    read_config=_read_vit,
    prefix="vit.",
    heads=("classifier.weight",),
    **_SHARED,
)
VIT_MAE = Family(read_config=_read_vit, prefix="vit.", heads=(), **_SHARED | {"write_config": None})
DEIT = Family(
    read_config=_read_deit,
    prefix="deit.",
    heads=("classifier.weight", "cls_classifier.weight"),
    processor_type="DeiTImageProcessor",
    **_SHARED,
)
