"""What the config files for real work share: fine-tuning by data set.

In the package, so that a config file works from any folder and can be copied anywhere.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vitcls.config.fields import default_config
from vitcls.config.parse import parse_arg


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a recipe gives; a config file's `EXPECTED` has one for each of its arguments.

    Attributes:
      accuracies: Those of runs that differ in nothing but the seed, one or more.
      num_images: Images of the split.
      source: Who measured them, and how.
      split: Where.
    """

    accuracies: tuple[float, ...]
    num_images: int
    source: str
    split: str = "test"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What depends on the data set.

    Attributes:
      total_steps: Length of training; warm-up and evaluations follow it.
      lr: Peak rate of SGD with momentum 0.9, batch 512.
      crop: See `data.crop`.
      holdout: Share of train that chooses the checkpoint.
      eval_split: What is measured at the end.
    """

    total_steps: int
    lr: float
    crop: str = "inception"
    holdout: float = 0.1
    eval_split: str = "test"


# Steps, crop and hold-out are those of big_vision's configs/transfer.py (its header has the table),
# and so are the rates of Pets and Flowers. The other rates are the default of
# google-research/vision_transformer, whose README has the accuracies that the config files cite.
# That code crops CIFAR at random areas ("inception") where transfer.py crops windows ("resmall"),
# and evaluates images resized to 384 x 384, where both transfer.py and this crop the centre of 448.
# It holds out as much as this does, however short the training.
SCHEDULES = {
    "tfds:imagenet2012": Schedule(20_000, 0.03, holdout=0.01, eval_split="validation"),
    "tfds:cifar10": Schedule(10_000, 0.03, crop="resmall", holdout=0.02),
    "tfds:cifar100": Schedule(10_000, 0.03, crop="resmall", holdout=0.02),
    "tfds:oxford_iiit_pet": Schedule(500, 0.003),
    "tfds:oxford_flowers102": Schedule(500, 0.003),
    # In neither table: CIFAR-100's steps and transfer.py's rate for it, untuned.
    "tfds:food101": Schedule(10_000, 0.01, holdout=0.02, eval_split="validation"),
}
# The networks of the checkpoints that the recipes start from: a plan needs no hub for them.
ARCHS = {
    "google/vit-base-patch16-224-in21k": "vit_b16",
    "google/vit-base-patch32-224-in21k": "vit_b32",
    "google/vit-large-patch16-224-in21k": "vit_l16",
    "WinKawaks/vit-small-patch16-224": "vit_s16",
    "microsoft/resnet-50": "resnet50",
}
# Whose accuracies the config files cite.
_PUBLISHED = (
    "google-research/vision_transformer's README, not measured here: in21k weights, 384 pixels, "
    "batch 512, SGD, dropout 0, other crops (see vitcls/recipes.py), evaluated without the last "
    "incomplete batch"
)
# For any other data, such as folders: a start for some thousand images, as for Pets.
OTHER = Schedule(500, 0.003)


def published(*, cifar10: float, cifar100: float, imagenet: float) -> dict[str, Expected]:
    """Returns `EXPECTED` of a config file, from accuracies in that README."""
    return {
        "data=tfds:cifar10": Expected((cifar10,), 10_000, _PUBLISHED),
        "data=tfds:cifar100": Expected((cifar100,), 10_000, _PUBLISHED),
        "data=tfds:imagenet2012": Expected((imagenet,), 50_000, _PUBLISHED, "validation"),
    }


def fine_tune(arg: str, *, pretrained: str, image_size: int = 384, resize: int = 448) -> ConfigDict:
    """Returns the recipe that a config file's argument asks for.

    Args:
      arg: `data=SOURCE`, one of `SCHEDULES` or anything that `data.source` takes.
      pretrained: The checkpoint to start from.
      image_size: Height and width that the network sees, in pixels.
      resize: Shorter side before the central crop, in pixels.
    """
    source = parse_arg(arg, data="")["data"]
    schedule = SCHEDULES.get(source, OTHER)
    config = default_config()

    config.data.source = source
    config.data.eval_splits = (schedule.eval_split,)
    config.data.holdout = schedule.holdout
    config.data.image_size = (image_size, image_size)
    config.data.resize = resize
    config.data.crop = schedule.crop

    config.model.pretrained = pretrained
    config.model.dtype = "bfloat16"

    config.optim.name = "sgd"
    config.optim.args.momentum = 0.9
    config.optim.lr = schedule.lr
    # Found when the steps are known: they may be overridden.
    config.optim.warmup_steps = placeholder(int)
    config.eval.every_steps = placeholder(int)

    config.train.global_batch_size = 512
    config.train.total_steps = schedule.total_steps
    config.log.every_steps = 50
    return config
