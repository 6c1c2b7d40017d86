"""Computes the fields that follow from data, checkpoint and devices."""

import math

from ml_collections import ConfigDict

from vitcls.config.checks import check_num_steps, cycle_lengths
from vitcls.config.parse import absolute_checkpoint, absolute_source, read_class_weights
from vitcls.errors import UserError

# BiT-HyperRule trains for 500 steps if there are fewer training images.
_SMALL_DATA = 20_000

# Shortest interval of evaluations if eval.every_steps is unset.
_MIN_EVERY_STEPS = 50


def resolve(
    config: ConfigDict,
    *,
    num_train: int,
    image_size: tuple[int, int],
    num_devices: int,
    saved: ConfigDict | None = None,
) -> ConfigDict:
    """Returns a copy with the fields filled in that follow from data, checkpoint and devices.

    A run makes the choices that its config leaves open when it begins. `saved` is the config of a
    run that is continued, which has these choices.
    """
    config = ConfigDict(config.to_dict())
    if saved is not None and config.train.micro_batch == 0:
        config.train.micro_batch = saved.train.micro_batch or 0
    batch_size = config.train.global_batch_size
    if batch_size % num_devices:
        below = batch_size // num_devices * num_devices
        use = f"{below} or {below + num_devices}" if below else f"{num_devices}"
        raise UserError(
            f"train.global_batch_size={batch_size} is not divisible by {num_devices} devices; "
            f"use {use}."
        )
    if config.train.total_epochs:
        total_steps = math.ceil(config.train.total_epochs * num_train / batch_size)
        config.train.update(total_steps=total_steps, total_epochs=0.0)
    if config.optim.warmup_steps is None:
        planned = planned_warmup(cycle_lengths(config)[0], num_train=num_train)
        config.optim.warmup_steps = planned if saved is None else saved.optim.warmup_steps
    if config.eval.every_steps is None:
        planned = max(config.train.total_steps // 10, _MIN_EVERY_STEPS)
        planned = planned if saved is None else saved.eval.every_steps
        config.eval.every_steps = planned if config.eval.select_split else 0
    # Epochs and open fields have become steps only now, so their sum is checked again.
    check_num_steps(config)
    if config.optim.lr_batch_size:
        factor = batch_size / config.optim.lr_batch_size
        config.optim.update(lr=config.optim.lr * factor, lr_batch_size=0)
        if config.adapt.probe_lr is not None:
            config.adapt.probe_lr *= factor
    eval_batch_size = config.eval.batch_size or batch_size
    config.eval.batch_size = math.ceil(eval_batch_size / num_devices) * num_devices
    # A run may be continued, or asked about, from another folder.
    config.data.source = absolute_source(config.data.source)
    config.model.pretrained = absolute_checkpoint(config.model.pretrained)
    config.loss.teacher = absolute_checkpoint(config.loss.teacher)
    # The file with the weights may change later, so the config keeps its content.
    config.loss.class_weights = read_class_weights(config.loss.class_weights)
    config.data.image_size = tuple(config.data.image_size or image_size)
    return config


def planned_warmup(num_steps: int, *, num_train: int) -> int:
    """Returns the steps of warm-up if `optim.warmup_steps` is unset.

    BiT-HyperRule (Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3) warms up for 100 of 500
    steps with small data, and for 500 of 10 000 or more steps otherwise. The README of
    google-research/vision_transformer has the shares for shorter training: 50 of 500, 100 of 1000.
    """
    if num_train < _SMALL_DATA:
        return min(num_steps // 5, 100)
    return min(num_steps // 10, 500)
