"""Hugging Face's `resnet` family: its config, and the names of its tensors."""

from pathlib import Path
from typing import Any

from vitcls.models.resnet import LAYER_TYPES, ResNetConfig
from vitcls.pretrained import keys
from vitcls.pretrained.json_fields import JsonFields
from vitcls.pretrained.keys import Key
from vitcls.pretrained.vit import ACTIVATIONS

# A config.json has no image size: the preprocessing says what the network is given.
HAS_IMAGE_SIZE = False
# Far above any ResNet that exists; a config beyond them is broken or hostile.
_MOST_WIDTH, _MOST_DEPTH, _MOST_STAGES = 1 << 16, 256, 16


def read_config(path: Path, *, num_classes: int) -> ResNetConfig:
    """Reads a `config.json`; what it leaves out is as in `transformers.ResNetConfig`.

    Args:
      path: The file.
      num_classes: Width of the head that the weights have, 0 for none.

    Returns:
      The config for images of 224 x 224 pixels, to be replaced by what the preprocessing makes.

    Raises:
      UserError: a value is not supported.
    """
    fields = JsonFields(path)
    if fields.integer("num_channels", 3, most=_MOST_WIDTH) != 3:
        raise fields.error("num_channels", "3")
    stages = dict(longest=_MOST_STAGES)
    return ResNetConfig(
        family="resnet",
        image_size=(224, 224),
        embedding_size=fields.integer("embedding_size", 64, most=_MOST_WIDTH),
        hidden_sizes=fields.integers(
            "hidden_sizes", (256, 512, 1024, 2048), most=_MOST_WIDTH, **stages
        ),
        depths=fields.integers("depths", (3, 4, 6, 3), most=_MOST_DEPTH, **stages),
        layer_type=fields.choice("layer_type", "bottleneck", {name: name for name in LAYER_TYPES}),
        num_classes=num_classes,
        activation=fields.choice("hidden_act", "relu", ACTIVATIONS),
        downsample_in_first_stage=fields.boolean("downsample_in_first_stage", False),
        downsample_in_bottleneck=fields.boolean("downsample_in_bottleneck", False),
    )


def config_to_json(config: ResNetConfig) -> dict[str, Any]:
    """The content of a `config.json`, all but the class names."""
    ours = list(ACTIVATIONS.values())
    return {
        "architectures": ["ResNetForImageClassification" if config.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": config.embedding_size,
        "hidden_sizes": list(config.hidden_sizes),
        "depths": list(config.depths),
        "layer_type": config.layer_type,
        "hidden_act": list(ACTIVATIONS)[ours.index(config.activation)],
        "downsample_in_first_stage": config.downsample_in_first_stage,
        "downsample_in_bottleneck": config.downsample_in_bottleneck,
    }


def has_head(names: set[str]) -> bool:
    """Whether the tensors are a `ResNetForImageClassification`'s, not a bare `ResNetModel`'s."""
    return "classifier.1.weight" in names


def ignored(names: set[str]) -> set[str]:
    """The tensors among `names` that nothing here needs.

    torch's BatchNorm counts its batches, and reads the count only where `momentum` is None.
    """
    return {name for name in names if name.endswith(".normalization.num_batches_tracked")}


def key_table(config: ResNetConfig) -> list[Key]:
    """Every parameter and statistic of `config`'s network with the tensor it is stored as.

    With a head the tensors are named as in a `ResNetForImageClassification`, whose backbone is
    `resnet.`; without one as in a bare `ResNetModel`.
    """
    prefix = "resnet." if config.num_classes else ""
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
        table += [
            Key("classifier/kernel", ("classifier.1.weight",), keys.LINEAR),
            Key("classifier/bias", ("classifier.1.bias",), keys.SAME),
        ]
    return table


def _conv_layer(ours: str, theirs: str) -> list[Key]:
    ours_norm, theirs_norm = f"{ours}/normalization", f"{theirs}.normalization"
    return [
        Key(f"{ours}/convolution/kernel", (f"{theirs}.convolution.weight",), keys.CONV),
        Key(f"{ours_norm}/scale", (f"{theirs_norm}.weight",), keys.SAME),
        Key(f"{ours_norm}/bias", (f"{theirs_norm}.bias",), keys.SAME),
        *(
            Key(f"{ours_norm}/{statistic}", (f"{theirs_norm}.{name}",), keys.SAME, "batch_stats")
            for statistic, name in (("mean", "running_mean"), ("var", "running_var"))
        ),
    ]
