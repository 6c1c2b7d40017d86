"""Hugging Face's `clip` and `siglip` families: the towers that see images, under a head.

Radford et al. 2021 (arXiv:2103.00020); Zhai et al. 2023 (arXiv:2303.15343), and SigLIP 2's
checkpoints of one resolution. Both read from whole models, whose text tower is left out, or from
the vision tower alone; `transformers` puts the head on the mean of the patches, which CLIP does not
normalise.
"""

import re
from typing import Any

import numpy as np

from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained import keys
from vitcls.pretrained.families import vit_fields
from vitcls.pretrained.families.family import Family
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.keys import Key


def _vision_fields(fields: JsonFields) -> tuple[JsonFields, int]:
    """The vision tower's fields, and the width of its MLPs."""
    if fields.any("model_type") in ("clip", "siglip"):
        fields = fields.group("vision_config")
    return fields, fields.integer("intermediate_size", 3072, at_most=vit_fields.MAX_WIDTH)


def _read_clip(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> ViTConfig:
    """What a file leaves out is as in `transformers.CLIPVisionConfig`."""
    del tensors
    fields, mlp_dim = _vision_fields(fields)
    return ViTConfig(
        family="clip",
        num_classes=num_classes,
        mlp_dim=mlp_dim,
        pool="mean",
        pre_norm=True,
        final_norm=False,
        patch_bias=False,
        **vit_fields.read(fields, patch_size=32, activation="quick_gelu", epsilon=1e-5),
    )


def _read_siglip(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> ViTConfig:
    """What a file leaves out is as in `transformers.SiglipVisionConfig`."""
    del tensors
    fields, mlp_dim = _vision_fields(fields)
    return ViTConfig(
        family="siglip",
        num_classes=num_classes,
        mlp_dim=mlp_dim,
        prefix_tokens=(),
        pool="mean",
        **vit_fields.read(fields, activation="gelu_pytorch_tanh", epsilon=1e-6),
    )


def _write(config: ViTConfig) -> dict[str, Any]:
    vit_fields.check_square(config)
    kind = {"clip": "CLIP", "siglip": "Siglip"}[config.family]
    vision = {
        "model_type": f"{config.family}_vision_model",
        **vit_fields.write(config),
        "intermediate_size": config.mlp_dim,
        "attention_dropout": 0.0,
    }
    if config.family == "siglip":
        vision["vision_use_head"] = False  # its pooling, which a classifier does not use
    if not config.num_classes:
        return {"architectures": [f"{kind}VisionModel"], **vision}
    return {
        "architectures": [f"{kind}ForImageClassification"],
        "model_type": config.family,
        "vision_config": vision,
    }


def _key_table(config: ViTConfig, prefix: str) -> list[Key]:
    embeddings = f"{prefix}embeddings"
    positions = (f"{embeddings}.position_embedding.weight",)
    table = [
        Key("embeddings/position_embeddings", positions, keys.TABLE),
        *keys.patches(config, f"{embeddings}.patch_embedding"),
    ]
    if "cls" in config.prefix_tokens:
        table += [Key("embeddings/cls_token", (f"{embeddings}.class_embedding",), keys.ROW)]
    if config.pre_norm:
        table += keys.norm("layernorm_pre", f"{prefix}pre_layrnorm")  # sic
    if config.final_norm:
        table += keys.norm("layernorm", f"{prefix}post_layernorm")
    for index in range(config.depth):
        ours, theirs = f"encoder/layer_{index}", f"{prefix}encoder.layers.{index}"
        qkv = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
        table += [
            *keys.norm(f"{ours}/layernorm_before", f"{theirs}.layer_norm1"),
            *keys.norm(f"{ours}/layernorm_after", f"{theirs}.layer_norm2"),
            *keys.dense(f"{ours}/attention/qkv", *qkv),
            *keys.dense(f"{ours}/attention/output", f"{theirs}.self_attn.out_proj"),
            *keys.dense(f"{ours}/mlp/intermediate", f"{theirs}.mlp.fc1"),
            *keys.dense(f"{ours}/mlp/output", f"{theirs}.mlp.fc2"),
        ]
    if config.num_classes:
        table += keys.heads("classifier")
    return table


def _unused_clip(config: ViTConfig) -> dict[str, np.ndarray]:
    """The norm of the class token, which only image-text models read."""
    return {
        "post_layernorm.weight": np.ones(config.width, np.float32),
        "post_layernorm.bias": np.zeros(config.width, np.float32),
    }


_OTHER_TOWER = r"text_model\..*|(text|visual)_projection\.weight|logit_(scale|bias)"
_SHARED = dict(
    write_config=_write, key_table=_key_table, prefix="vision_model.", heads=("classifier.weight",)
)
CLIP = Family(
    read_config=_read_clip,
    ignored=re.compile(rf"{_OTHER_TOWER}|embeddings\.position_ids|post_layernorm\.(weight|bias)"),
    unused=_unused_clip,
    processor_type="CLIPImageProcessor",
    spare_bytes=1 << 30,  # ViT-L's text tower has half of it, however small the other one is
    **_SHARED,
)
SIGLIP = Family(
    read_config=_read_siglip,
    ignored=re.compile(rf"{_OTHER_TOWER}|embeddings\.position_ids|head\..*"),
    processor_type="SiglipImageProcessor",
    **_SHARED,
)
