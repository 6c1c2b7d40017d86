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
    config: ConfigDict, class_names: tuple[str, ...], *, begun: Path | None = None
) -> tuple[pretrained.Files | None, pretrained.Config, pretrained.Processor]:
    """Returns the checkpoint's files (None without one), the network's config and the processor.

    The last two are made for the classes and the image size of this run.

    Args:
      config: The run's.
      class_names: The data's.
      begun: The workdir of a run that goes on, which has both already: the pretrained checkpoint
        is not needed any more.
    """
    if begun is not None:
        try:
            return None, *pretrained.read_json(begun / "model", tensors=None)
        except UserError as error:
            raise UserError(
                f"{error} It is of a run that has checkpoints: put it back, or use another "
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
            _check_kept_head(model_config, processor, class_names)
            class_names = processor.class_names
        model_config = dataclasses.replace(model_config, num_classes=len(class_names))
        if image_size:
            model_config = model_config.resized(image_size)
        processor = processor.resized(model_config.image_size)
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
    """The config of a network by its name, in whichever family it is."""
    if arch in resnet.SIZES:
        return resnet.resnet_config(arch, num_classes=num_classes, image_size=image_size)
    if vit_config.NAME.fullmatch(arch):
        return vit_config.vit_config(arch, num_classes=num_classes, image_size=image_size)
    raise unknown("architecture model.arch", arch, [*vit_config.EXAMPLES, *resnet.SIZES])


def _check_kept_head(
    model_config: pretrained.Config, processor: pretrained.Processor, class_names: tuple[str, ...]
) -> None:
    kept = processor.class_names
    if model_config.num_classes != len(class_names):
        raise UserError(
            f"model.head='keep' keeps {model_config.num_classes} classes, but the data has "
            f"{len(class_names)}; use model.head='new'."
        )
    if moved := classes.find_moved(class_names, kept):
        raise UserError(
            "model.head='keep': the checkpoint has the data's classes in another order, such as "
            f"{moved[0]!r}: {kept[:5]} ... there, {class_names[:5]} ... in the data. Use "
            "model.head='new'."
        )
    if kept != class_names:
        log.warning(
            "model.head='keep': class names differ (%s ... kept, %s ... in the data); classes are "
            "matched by position.", kept[:3], class_names[:3],
        )  # fmt: skip


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
