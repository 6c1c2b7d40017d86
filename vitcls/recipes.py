"""What config files for real data share: schedules by data set.

This file is in the package so that config files work from any folder.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vitcls.config.fields import default_config
from vitcls.config.parse import parse_arg


@dataclasses.dataclass(frozen=True)
class Expected:
    """The expected result of a recipe; `EXPECTED` of a config file has one for each argument.

    Attributes:
      accuracies: Accuracy of one or more runs that differ only in the seed.
      num_images: Images of the split.
      source: Where the accuracies were published, or how they were measured.
      split: The split that was evaluated.
    """

    accuracies: tuple[float, ...]
    num_images: int
    source: str
    split: str = "test"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Settings that depend on the data set.

    Attributes:
      total_steps: Length of training, from which warm-up and evaluation intervals follow.
      lr: Peak learning rate of SGD with momentum 0.9 and batches of 512.
      crop: See `data.crop`.
      holdout: Share of train that is held out to choose the checkpoint.
      eval_split: The split that is evaluated at the end.
    """

    total_steps: int
    lr: float
    crop: str = "inception"
    holdout: float = 0.1
    eval_split: str = "test"


# Steps, crop and hold-out are from big_vision's configs/transfer.py (the table in its header), and
# so are the learning rates of Pets and Flowers. The other rates are the default of
# google-research/vision_transformer, whose README has the accuracies that the config files cite.
# For CIFAR that code samples crops of random areas ("inception"), and transfer.py samples windows
# ("resmall"). It evaluates images resized to 384 x 384; transfer.py and this file crop the centre
# of 448. It holds out the same shares.
SCHEDULES = {
    "tfds:imagenet2012": Schedule(20_000, 0.03, holdout=0.01, eval_split="validation"),
    "tfds:cifar10": Schedule(10_000, 0.03, crop="resmall", holdout=0.02),
    "tfds:cifar100": Schedule(10_000, 0.03, crop="resmall", holdout=0.02),
    "tfds:oxford_iiit_pet": Schedule(500, 0.003),
    "tfds:oxford_flowers102": Schedule(500, 0.003),
    # Not in either table: the steps of CIFAR-100 and transfer.py's rate for it, untuned.
    "tfds:food101": Schedule(10_000, 0.01, holdout=0.02, eval_split="validation"),
}
# The networks of the checkpoints that the recipes start from, so that a plan needs no hub.
ARCHS = {
    "google/vit-base-patch16-224-in21k": "vit_b16",
    "google/vit-base-patch32-224-in21k": "vit_b32",
    "google/vit-large-patch16-224-in21k": "vit_l16",
    "WinKawaks/vit-small-patch16-224": "vit_s16",
    "microsoft/resnet-50": "resnet50",
}
# The source of the accuracies that the config files cite.
_PUBLISHED = (
    "google-research/vision_transformer's README, not measured here: in21k weights, 384 pixels, "
    "batch 512, SGD, dropout 0, other crops (see vitcls/recipes.py), evaluated without the last "
    "incomplete batch"
)
# For other data, such as folders: the schedule of Pets suits a few thousand images.
OTHER = Schedule(500, 0.003)


def published(*, cifar10: float, cifar100: float, imagenet: float) -> dict[str, Expected]:
    """Returns `EXPECTED` of a config file for the accuracies in that README."""
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
    # Overrides may change the steps, so these are derived from them later.
    config.optim.warmup_steps = placeholder(int)
    config.eval.every_steps = placeholder(int)

    config.train.global_batch_size = 512
    config.train.total_steps = schedule.total_steps
    config.log.every_steps = 50
    return config
