"""Hugging Face's `resnet` family: its config, and the names of its tensors."""

import re
from typing import Any

import numpy as np

from vitcls.models.resnet import LAYER_TYPES, ResNetConfig
from vitcls.pretrained import keys
from vitcls.pretrained.families.family import Family
from vitcls.pretrained.families.vit_fields import ACTIVATIONS, activation_name
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.keys import Key

# Far above any ResNet that exists; a config beyond them is broken or hostile.
_MAX_WIDTH, _MAX_DEPTH, _MAX_STAGES = 1 << 16, 256, 16


def _read(fields: JsonFields, num_classes: int, tensors: set[str] | None) -> ResNetConfig:
    """What a file leaves out is as in `transformers.ResNetConfig`.

    The image size is to be replaced by what the preprocessing makes.
    """
    del tensors
    if fields.integer("num_channels", 3, at_most=_MAX_WIDTH) != 3:
        raise fields.error("num_channels", "3")
    stages = dict(max_length=_MAX_STAGES)
    depths = fields.integers("depths", (3, 4, 6, 3), at_most=_MAX_DEPTH, **stages)
    if sum(depths) > _MAX_DEPTH:
        raise fields.error("depths", f"at most {_MAX_DEPTH} layers in all")
    return ResNetConfig(
        family="resnet",
        image_size=(224, 224),
        embedding_size=fields.integer("embedding_size", 64, at_most=_MAX_WIDTH),
        hidden_sizes=fields.integers(
            "hidden_sizes", (256, 512, 1024, 2048), at_most=_MAX_WIDTH, **stages
        ),
        depths=depths,
        layer_type=fields.choice("layer_type", "bottleneck", {name: name for name in LAYER_TYPES}),
        num_classes=num_classes,
        activation=fields.choice("hidden_act", "relu", ACTIVATIONS),
        downsample_in_first_stage=fields.boolean("downsample_in_first_stage", False),
        downsample_in_bottleneck=fields.boolean("downsample_in_bottleneck", False),
    )


def _write(config: ResNetConfig) -> dict[str, Any]:
    return {
        "architectures": ["ResNetForImageClassification" if config.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": config.embedding_size,
        "hidden_sizes": list(config.hidden_sizes),
        "depths": list(config.depths),
        "layer_type": config.layer_type,
        "hidden_act": activation_name(config.activation),
        "downsample_in_first_stage": config.downsample_in_first_stage,
        "downsample_in_bottleneck": config.downsample_in_bottleneck,
    }


def _key_table(config: ResNetConfig, prefix: str) -> list[Key]:
    table = _conv_layer("embedder", f"{prefix}embedder.embedder")
    num_convolutions = 2 if config.layer_type == "basic" else 3
    channels = config.embedding_size
    for stage, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        has_stride = stage > 0 or config.downsample_in_first_stage
        for index in range(depth):
            ours = f"encoder/stage_{stage}/layer_{index}"
            theirs = f"{prefix}encoder.stages.{stage}.layers.{index}"
            if index == 0 and (has_stride or channels != width):
                table += _conv_layer(f"{ours}/shortcut", f"{theirs}.shortcut")
            for number in range(num_convolutions):
                table += _conv_layer(f"{ours}/conv_layer_{number}", f"{theirs}.layer.{number}")
        channels = width
    if config.num_classes:
        table += keys.heads("classifier.1")
    return table


def _conv_layer(ours: str, theirs: str) -> list[Key]:
    return [
        Key(f"{ours}/convolution/kernel", (f"{theirs}.convolution.weight",), keys.CONV),
        *keys.batch_norm(f"{ours}/normalization", f"{theirs}.normalization"),
    ]


def _unused(config: ResNetConfig) -> dict[str, np.ndarray]:
    """Torch's BatchNorm counts its batches, and reads the count only where `momentum` is None."""
    means = [
        name for key in _key_table(config, "") for name in key.theirs if "running_mean" in name
    ]
    count = np.zeros((), np.int64)
    return {name.replace("running_mean", "num_batches_tracked"): count for name in means}


RESNET = Family(
    read_config=_read,
    write_config=_write,
    key_table=_key_table,
    prefix="resnet.",
    heads=("classifier.1.weight",),
    ignored=re.compile(r".*\.normalization\.num_batches_tracked"),
    unused=_unused,
    processor_type="ConvNextImageProcessor",
    has_image_size=False,
)
