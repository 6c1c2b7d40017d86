"""The network of a run, and how its images are prepared."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.data import images
from vitcls.data.sources import classes
from vitcls.errors import UserError, unknown
from vitcls.models import resnet, vit_config

log = logging.getLogger("vitcls")


def open_model(
    config: ConfigDict, class_names: tuple[str, ...], *, own: Path | None = None
) -> tuple[pretrained.Files | None, pretrained.Config, pretrained.Processor]:
    """Returns the checkpoint's files (None without one), the network's config and the processor.

    The last two are made for the classes and the image size of this run.

    Args:
      config: The run's.
      class_names: The data's.
      own: Folder with the config and the processor of a run that is continued. The pretrained
        checkpoint is not read again.
    """
    if own is not None:
        try:
            return None, *pretrained.read_json(own, tensors=None)
        except UserError as error:
            raise UserError(
                f"{error} It belongs to a run that has checkpoints: put it back, or use another "
                "--workdir."
            ) from error
    image_size = config.data.image_size
    if not config.model.pretrained:
        files = None
        model_config = _arch_config(
            config.model.arch, num_classes=len(class_names), image_size=image_size
        )
        processor = pretrained.Processor(size=image_size)
    else:
        files = pretrained.find(config.model.pretrained, allow_pickle=config.model.allow_pickle)
        model_config, processor = pretrained.read_config(files, new_head=config.model.head == "new")
        if config.model.head == "keep":
            kept, num_classes = processor.class_names, model_config.num_classes
            classes.check_kept(kept, class_names, num_classes=num_classes)
            class_names = kept
        model_config = dataclasses.replace(model_config, num_classes=len(class_names))
        # Without a size of its own the run has that of the checkpoint, whose positions then fit.
        if image_size:
            model_config = model_config.resized(image_size)
        processor = processor.resized(model_config.image_size)
    # Hours of training should not end with a network that cannot be saved.
    pretrained.check_format(model_config)
    if 0 < config.data.resize < max(processor.size):
        raise UserError(
            f"data.resize={config.data.resize} is smaller than the image size {processor.size} "
            "that is cropped from it."
        )
    shorter = config.data.resize or processor.resize
    if isinstance(shorter, int) and shorter < max(processor.size):
        log.warning(
            "data.image_size=%s: evaluation scales the shorter side to %d, so that images of other "
            "proportions get black borders; data.resize=%d would cut them instead.",
            processor.size, shorter, max(processor.size),
        )  # fmt: skip
    return (
        files,
        model_config,
        dataclasses.replace(
            processor,
            resize=shorter,
            id2label=dict(enumerate(class_names)),
        ),
    )


def _arch_config(arch: str, *, num_classes: int, image_size: tuple[int, int]) -> pretrained.Config:
    """Returns the config of a network by its name."""
    if arch in resnet.SIZES:
        return resnet.resnet_config(arch, num_classes=num_classes, image_size=image_size)
    if vit_config.NAME.fullmatch(arch):
        return vit_config.vit_config(arch, num_classes=num_classes, image_size=image_size)
    raise unknown("architecture model.arch", arch, [*vit_config.EXAMPLES, *resnet.SIZES])


def train_transform(config: ConfigDict, processor: pretrained.Processor) -> Callable:
    """Returns the host's part of the training pixels, `(image, rng) -> uint8 (H, W, 3)`."""
    sized = dict(size=processor.size, resample=processor.resample)
    if config.data.crop == "inception":
        return functools.partial(
            images.random_resized_crop,
            scale=config.data.crop_scale, ratio=config.data.crop_ratio, **sized,
        )  # fmt: skip
    if config.data.crop == "resmall":
        return functools.partial(images.resize_and_random_crop, resize=config.data.resize, **sized)
    return functools.partial(_fixed_pixels, processor=processor)


def _fixed_pixels(image, rng, *, processor: pretrained.Processor) -> np.ndarray:
    return processor.pixels(image)
