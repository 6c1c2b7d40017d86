"""timm's plain ViTs, DeiTs and ResNets: the hub's `timm/...`, and what timm 0.9 and newer saves.

Its config.json names an architecture, whose sizes stand in our own tables, and says how images are
prepared. The config made of it is that of a Hugging Face family, in whose format it is then saved.
`transformers` wraps timm's networks as `timm_wrapper`: the same, under one more module.
"""

import dataclasses
import json
import math
import re

from vitcls.data.images import RESAMPLING
from vitcls.errors import UserError
from vitcls.models import resnet, vit_config
from vitcls.models.resnet import ResNetConfig
from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained import keys
from vitcls.pretrained.families.family import MAX_CLASSES, Config, Family, label_names
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.keys import Key
from vitcls.pretrained.processor import Processor

_SIZES = {"tiny": "ti", "small": "s", "base": "b", "large": "l", "huge": "h"}
_VIT = re.compile(
    rf"(vit|deit)_(?P<size>{'|'.join(_SIZES)})(?P<distilled>_distilled)?"
    r"_patch(?P<patch>8|14|16|32)_(224|384)"
)
_SUPPORTED = (
    f"vit_{{{','.join(_SIZES)}}}_patch{{8,14,16,32}}_{{224,384}}, "
    "deit_{tiny,small,base}[_distilled]_patch16_{224,384} or resnet{18,34,50,101,152}"
)
_MAX_PIXELS = 8192


def is_timm(fields: JsonFields) -> bool:
    """Whether a config.json is timm's, or that of `transformers` for one of its networks."""
    wrapper = "timm_wrapper"
    return "architecture" in fields and fields.any("model_type", wrapper) == wrapper


def _read(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> Config:
    """The config under the family whose network is the same."""
    del tensors
    name = str(fields.any("architecture"))
    image_size = _image_size(_pretrained_cfg(fields))
    if name in resnet.SIZES:
        _check_arguments(fields, image_size, pool="avg")
        return resnet.resnet_config(name, num_classes=num_classes, image_size=image_size)
    match = _VIT.fullmatch(name)
    if not match:
        raise fields.error("architecture", _SUPPORTED)
    _check_arguments(fields, image_size, pool="token")
    name = f"vit_{_SIZES[match['size']]}{match['patch']}"
    config = vit_config.vit_config(name, num_classes=num_classes, image_size=image_size)
    if match["distilled"]:
        tokens = dict(prefix_tokens=("cls", "dist"), pool="cls_dist")
        config = dataclasses.replace(config, family="deit", **tokens)
    return config


def _pretrained_cfg(fields: JsonFields) -> JsonFields:
    if "pretrained_cfg" not in fields:  # before timm 0.9 its fields were at the top level
        raise UserError(f"{fields.path} has no pretrained_cfg; save it again with a newer timm.")
    return fields.group("pretrained_cfg")


def _image_size(cfg: JsonFields) -> tuple[int, int]:
    """(height, width). `test_input_size` is not used, nor is it in timm unless asked for."""
    size = cfg.integers("input_size", (3, 224, 224), at_most=_MAX_PIXELS, max_length=3)
    if len(size) != 3 or size[0] != 3:
        raise cfg.error("input_size", "[3, height, width]")
    return size[1:]


def _check_arguments(fields: JsonFields, image_size: tuple[int, int], *, pool: str) -> None:
    """Refuses arguments of timm's networks that make them others than those of our tables."""
    if fields.any("global_pool", pool) not in (pool, ""):  # "": of a network for features
        raise fields.error("global_pool", repr(pool))
    usual = {
        "global_pool": pool,
        "img_size": list(image_size),
        "in_chans": 3,
        "num_classes": fields.any("num_classes"),
    }
    found = fields.any("model_args", {})
    if not isinstance(found, dict) or found != {name: usual.get(name) for name in found}:
        raise fields.error("model_args", f"among {json.dumps(usual)}")


def _class_names(fields: JsonFields) -> dict[int, str]:
    """Descriptions of the classes if there are any, or else their names, or else numbers."""
    cfg = _pretrained_cfg(fields)
    known = cfg.integer("num_classes", 1000, at_least=0, at_most=MAX_CLASSES)
    num_classes = fields.integer("num_classes", known, at_most=MAX_CLASSES)
    if cfg.any("label_offset"):  # leaves out the first rows of the stored head
        raise cfg.error("label_offset", "0")
    names = fields.any("label_names", cfg.any("label_names"))
    if names is None:
        return label_names(num_classes)
    if not isinstance(names, list) or len(names) != num_classes:
        raise fields.error("label_names", f"a list of {num_classes} names")
    described = fields.any("label_descriptions", cfg.any("label_descriptions", {}))
    if isinstance(described, dict):
        names = [described.get(str(name), name) for name in names]
    if not isinstance(described, dict) or not all(isinstance(name, str) for name in names):
        raise fields.error("label_descriptions", "an object of texts, under names of label_names")
    return dict(enumerate(names))


def _read_processor(fields: JsonFields, id2label: dict[int, str]) -> Processor:
    """The transform that timm evaluates with, but for where a crop with an odd margin lies.

    With a margin of 3, 7, 11, ... pixels timm crops one pixel further down, or right: it rounds
    half a margin to the even neighbour, Hugging Face's processors and ours always down.
    """
    cfg = _pretrained_cfg(fields)
    size = _image_size(cfg)
    crop_pct = cfg.number("crop_pct", 0.875)
    if not max(size) / _MAX_PIXELS <= crop_pct <= 1:
        raise cfg.error("crop_pct", f"from {max(size) / _MAX_PIXELS} to 1")
    resize = tuple(math.floor(side / crop_pct) for side in size)
    if cfg.choice("crop_mode", "center", {"center": True, "squash": False}):
        if size[0] != size[1]:
            raise cfg.error("input_size", "square where crop_mode is center")
        resize = resize[0]
    std = cfg.numbers("std", (0.229, 0.224, 0.225))
    if min(std) <= 0:
        raise cfg.error("std", "positive")
    return Processor(
        size=size,
        resize=None if resize == size else resize,
        resample=cfg.choice("interpolation", "bicubic", {name: name for name in RESAMPLING}),
        mean=cfg.numbers("mean", (0.485, 0.456, 0.406)),
        std=std,
        id2label=id2label,
    )


def _key_table(config: Config, prefix: str) -> list[Key]:
    """Unlike Hugging Face's, the head's tensors also have the prefix."""
    if isinstance(config, ResNetConfig):
        return _resnet_table(config, prefix)
    return _vit_table(config, prefix)


def _vit_table(config: ViTConfig, prefix: str) -> list[Key]:
    table = [
        Key("embeddings/position_embeddings", (f"{prefix}pos_embed",), keys.SAME),
        *keys.patches(config, f"{prefix}patch_embed.proj"),
        *keys.norm("layernorm", f"{prefix}norm"),
    ]
    for token in config.prefix_tokens:
        table += [Key(f"embeddings/{token}_token", (f"{prefix}{token}_token",), keys.SAME)]
    for index in range(config.depth):
        ours, theirs = f"encoder/layer_{index}", f"{prefix}blocks.{index}"
        table += [
            *keys.norm(f"{ours}/layernorm_before", f"{theirs}.norm1"),
            *keys.norm(f"{ours}/layernorm_after", f"{theirs}.norm2"),
            *keys.dense(f"{ours}/attention/qkv", f"{theirs}.attn.qkv"),
            *keys.dense(f"{ours}/attention/output", f"{theirs}.attn.proj"),
            *keys.dense(f"{ours}/mlp/intermediate", f"{theirs}.mlp.fc1"),
            *keys.dense(f"{ours}/mlp/output", f"{theirs}.mlp.fc2"),
        ]
    if config.num_classes:
        names = (f"{prefix}head", f"{prefix}head_dist")
        table += keys.heads(*names[: 2 if config.pool == "cls_dist" else 1])
    return table


def _resnet_table(config: ResNetConfig, prefix: str) -> list[Key]:
    table = _conv_layer("embedder", f"{prefix}conv1", f"{prefix}bn1")
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            ours = f"encoder/stage_{stage}/layer_{index}"
            theirs = f"{prefix}layer{stage + 1}.{index}"
            if index == 0 and (stage > 0 or config.layer_type == "bottleneck"):
                shortcut = f"{theirs}.downsample"
                table += _conv_layer(f"{ours}/shortcut", f"{shortcut}.0", f"{shortcut}.1")
            for n in range(2 if config.layer_type == "basic" else 3):
                names = f"{theirs}.conv{n + 1}", f"{theirs}.bn{n + 1}"
                table += _conv_layer(f"{ours}/conv_layer_{n}", *names)
    return table + (keys.heads(f"{prefix}fc") if config.num_classes else [])


def _conv_layer(ours: str, convolution: str, batch_norm: str) -> list[Key]:
    return [
        Key(f"{ours}/convolution/kernel", (f"{convolution}.weight",), keys.CONV),
        *keys.batch_norm(f"{ours}/normalization", batch_norm),
    ]


TIMM = Family(
    read_config=_read,
    write_config=None,
    key_table=_key_table,
    prefix="timm_model.",
    heads=("head.weight", "fc.weight", "timm_model.head.weight", "timm_model.fc.weight"),
    ignored=re.compile(r".*\.num_batches_tracked"),
    read_class_names=_class_names,
    read_processor=_read_processor,
    antialias=True,
)
