"""What a run is made from: splits, network, processor, and the fields that follow from them."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.config.fields import (
    check_num_steps,
    cycle_lengths,
    flatten,
    parse_fold,
    read_class_weights,
    read_saved_config,
)
from vitcls.data import images, sources
from vitcls.data.cache import cached
from vitcls.data.sources import classes
from vitcls.data.sources.division import DIVISIONS
from vitcls.data.sources.split import check_no_class_is_empty, num_shared
from vitcls.errors import UserError, unknown
from vitcls.models import resnet, vit
from vitcls.run import records
from vitcls.run.program import Program, learning_rate, trains_statistics, with_fields
from vitcls.run.teacher import Teacher

log = logging.getLogger("vitcls")

# What `traps` warns of: fewer images that select, and of Adam on all of a ViT of this width or
# more, a higher rate.
_FEW_IMAGES, _SMALL_WIDTH, _MOST_LR = 100, 192, 3e-4
# Below so many training images BiT-HyperRule trains for 500 steps.
_SMALL_DATA = 20_000
# Of a run that should be saved before its end.
_MANY_STEPS = 1000
# Between evaluations where eval.every_steps leaves it open.
_MIN_EVERY_STEPS = 50


def keep_division(config: ConfigDict, begun: Path | None) -> ConfigDict:
    """Returns a copy whose data.division is not empty: that of the run begun, if there is one."""
    config = ConfigDict(config.to_dict())
    if begun is not None and not config.data.division:
        config.data.division = read_saved_config(begun / "config.json").data.division
        if config.data.division == "position":
            log.info(
                "This run began before images were chosen by a hash of their ids, and keeps its "
                "data.division='position': the same images are held out, sampled and tested on."
            )
    config.data.division = config.data.division or DIVISIONS[0]
    return config


def open_splits(
    config: ConfigDict, *, begun: bool = False
) -> tuple[sources.Split, dict[str, sources.Split]]:
    """Returns the split to train on, and by name those that are evaluated.

    Args:
      config: The run's.
      begun: Whether it began already. Then it may have what is refused in a new one: classes
        without training images, and images that are trained on and evaluated; this is warned of.
    """
    data = config.data
    chosen = dict(seed=config.train.seed, division=data.division or DIVISIONS[0])
    open_split = functools.partial(
        sources.open_split,
        data.source,
        data_dir=data.data_dir or None,
        division=chosen["division"],
    )
    keep = functools.partial(cached, where=data.cache)
    train, evaluated = open_split(data.train_split), {}
    is_thinned = data.per_class or data.long_tail
    if not is_thinned:  # whole, and so the same on disk for runs with other seeds
        train = keep(train)
    if "holdout" in (config.eval.select_split, *data.eval_splits):
        if data.fold:
            train, evaluated["holdout"] = sources.take_fold(train, *parse_fold(data.fold), **chosen)
        elif data.holdout:
            train, evaluated["holdout"] = sources.hold_out(train, data.holdout, **chosen)
    if is_thinned:
        if data.per_class:
            train = sources.take_per_class(train, data.per_class, **chosen)
        else:
            train = sources.take_long_tail(train, data.long_tail, **chosen)
        train = keep(train)
        evaluated = {name: keep(split) for name, split in evaluated.items()}
    for name in [config.eval.select_split, *data.eval_splits]:
        if name and name not in evaluated:
            evaluated[name] = keep(open_split(name))
    evaluated = {name: classes.align(train, split) for name, split in evaluated.items()}
    try:
        check_no_class_is_empty(train)
        _check_apart(config, train, evaluated)
    except UserError as error:
        if not begun:
            raise
        log.warning("%s (The run began so, and continues.)", error)
    if config.eval.select_metric == "top5_accuracy" and len(train.class_names) <= 5:
        raise UserError(
            f"eval.select_metric='top5_accuracy' says nothing with {len(train.class_names)} "
            "classes; use 'accuracy'."
        )
    return train, evaluated


def _check_apart(
    config: ConfigDict, train: sources.Split, evaluated: dict[str, sources.Split]
) -> None:
    """Refuses images that both fit and choose, fit and measure, or choose and measure."""
    select, eval_splits = config.eval.select_split, config.data.eval_splits
    for name, split in evaluated.items():
        if shared := num_shared(split, train):
            field, does = "data.eval_splits", "measure it"
            if name == select:
                field, does = "eval.select_split", "choose its checkpoint"
            raise UserError(
                f"{name!r} of {field} shares {shared} of its {len(split)} images with "
                f"data.train_split={config.data.train_split!r}: images that a network is trained "
                f"on cannot {does}. Name a split of other images, such as 'holdout', or a "
                "data.train_split without them."
            )
    for name in eval_splits if select else ():
        if num_shared(evaluated[name], evaluated[select]):
            raise UserError(
                f"eval.select_split={select!r} shares images with {name!r} of data.eval_splits: "
                "images that choose the checkpoint cannot measure it. Select on 'holdout'."
            )


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
            class_names = tuple(processor.id2label.values())
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
    if vit.NAME.fullmatch(arch):
        return vit.vit_config(arch, num_classes=num_classes, image_size=image_size)
    raise unknown("architecture model.arch", arch, [*vit.EXAMPLES, *resnet.SIZES])


def _check_kept_head(
    model_config: pretrained.Config, processor: pretrained.Processor, class_names: tuple[str, ...]
) -> None:
    kept = tuple(processor.id2label.values())
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


def resolve(
    config: ConfigDict,
    *,
    num_train: int,
    image_size: tuple[int, int],
    num_devices: int,
    begun: Path | None = None,
) -> ConfigDict:
    """Returns a copy with what follows from data, checkpoint and devices filled in.

    What the config leaves open was chosen when a run began: `begun`, the workdir of a run that is
    continued, has it.
    """
    config = ConfigDict(config.to_dict())
    saved = read_saved_config(begun / "config.json") if begun is not None else None
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
    check_num_steps(config)
    if config.optim.lr_batch_size:
        factor = batch_size / config.optim.lr_batch_size
        config.optim.update(lr=config.optim.lr * factor, lr_batch_size=0)
        if config.adapt.probe_lr is not None:
            config.adapt.probe_lr *= factor
    eval_batch_size = config.eval.batch_size or batch_size
    config.eval.batch_size = math.ceil(eval_batch_size / num_devices) * num_devices
    config.loss.class_weights = read_class_weights(config.loss.class_weights)
    config.data.image_size = tuple(config.data.image_size or image_size)
    return config


def planned_warmup(num_steps: int, *, num_train: int) -> int:
    """Returns the warm-up of so many steps where `optim.warmup_steps` leaves it open.

    The numbers are those of BiT-HyperRule (Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3),
    100 of 500 steps for small data and 500 of 10 000 or more for others, with the shares that
    google-research/vision_transformer's README has for shorter training: 50 of 500, 100 of 1000.
    """
    if num_train < _SMALL_DATA:
        return min(num_steps // 5, 100)
    return min(num_steps // 10, 500)


def rate_changes(config: ConfigDict, path: Path, *, step: int) -> list[str]:
    """Returns a warning for each way in which a continued run has another rate than was planned.

    Args:
      config: The run's, as `resolve` returns it.
      path: Its config as it was saved.
      step: The last step that was saved.
    """
    changes, total_steps, saved = [], config.train.total_steps, read_saved_config(path)
    planned, restarts = saved.train.total_steps, tuple(saved.optim.restarts)
    before = with_fields(config, {"train.total_steps": planned, "optim.restarts": restarts})
    # The field came along with the change.
    is_old = "restarts" not in json.loads(path.read_text())["optim"]
    if is_old and config.optim.schedule == "step" and config.optim.warmup_steps and step < planned:
        changes.append(
            "optim.schedule='step' divides at 30, 60 and 90 % of all steps; this run began when it "
            f"did so at those of what follows the warm-up. It continues with a learning rate of "
            f"{float(learning_rate(before)(step)):.2g}."
        )
    last = float(learning_rate(before)(step - 1))
    rate = float(learning_rate(config)(step))
    if planned >= total_steps or (config.optim.restarts == restarts and rate == last):
        return changes
    if config.optim.restarts != restarts:
        how = f"optim.restarts={config.optim.restarts} begins optim.schedule anew"
    else:
        how = (
            f"optim.schedule={config.optim.schedule!r} is laid out anew over all steps. Given in "
            f"the first longer start, --config.optim.restarts='{(*restarts, planned)}' begins it "
            f"anew after step {planned} instead, with its warm-up"
        )
    return [
        *changes,
        f"train.total_steps={total_steps} lengthens a run of {planned} steps: the learning rate "
        f"goes from {last:.2g} in step {step} to {rate:.2g} in the next. {how}.",
    ]


def facts(
    config: ConfigDict,
    train_split: sources.Split,
    eval_splits: dict[str, sources.Split],
    *,
    begun: Path | None,
) -> dict[str, Any]:
    """Returns what every process of a run must agree on, by name.

    Args:
      config: The run's, as `resolve` returns it.
      train_split: The split to train on.
      eval_splits: By name, those that are evaluated.
      begun: The workdir of a run that goes on.
    """
    fingerprints = {split.name: split.fingerprint for split in [train_split, *eval_splits.values()]}
    return {
        **{f"config.{field}": value for field, value in flatten(config).items()},
        **{f"data of split {name!r}": value for name, value in fingerprints.items()},
        "workdir with checkpoints": begun is not None,
    }


def traps(config: ConfigDict, model_config: pretrained.Config, *, num_select: int) -> list[str]:
    """Returns a warning, with its reason, for each known way to a bad result.

    Args:
      config: The run's, as `resolve` returns it.
      model_config: The network's.
      num_select: Images that choose the checkpoint; 0: none does.
    """
    optim, adapt, found = config.optim, config.adapt, []
    is_whole = adapt.train in ("", "all") and not (adapt.freeze or adapt.lora_rank)
    is_vit = isinstance(model_config, vit.ViTConfig) and model_config.width >= _SMALL_WIDTH
    if (
        config.model.pretrained and is_vit and is_whole and adapt.layer_decay == 1
        and "adam" in optim.name and optim.lr > _MOST_LR
    ):  # fmt: skip
        found.append(
            f"optim.lr={optim.lr:g} is high for {optim.name} on all of a pretrained ViT: a step "
            "moves every weight by about the rate, however small its gradient, and so soon away "
            "from what was pretrained. Try 1e-5 to 1e-4, or adapt.layer_decay."
        )
    if 0 < num_select < _FEW_IMAGES:
        error = 100 * math.sqrt(0.9 * 0.1 / num_select)
        found.append(
            f"eval.select_split={config.eval.select_split!r} has {num_select} images: an accuracy "
            f"of 90 % has a standard error of {error:.1f} points there, so the checkpoint is "
            "chosen largely by chance. Hold out more (data.holdout), or set eval.select_split=''."
        )
    shortest = min(cycle_lengths(config))
    if optim.schedule != "constant" and optim.warmup_steps > shortest / 2:
        found.append(
            f"optim.warmup_steps={optim.warmup_steps} is most of the {shortest} steps of "
            f"optim.schedule={optim.schedule!r}, which hardly falls before the end. Set it to a "
            "tenth, or train for longer."
        )
    is_saved = config.checkpoint.every_steps or config.eval.every_steps
    if not is_saved and config.train.total_steps >= _MANY_STEPS:
        found.append(
            f"Nothing of the {config.train.total_steps} steps is saved before the end, unless a "
            "signal stops them: a crash loses all. Set checkpoint.every_steps."
        )
    corrections = {
        "loss.class_weights": config.loss.class_weights != "none",
        "loss.logit_adjustment": config.loss.logit_adjustment,
        "data.sampling": config.data.sampling != "uniform",
    }
    corrections = [field for field, is_set in corrections.items() if is_set]
    if len(corrections) > 1:
        found.append(
            f"{' and '.join(corrections)} each correct for rare classes: together they correct "
            "more than once. Set one of them."
        )
    if adapt.l2_sp and optim.weight_decay:
        found.append(
            "adapt.l2_sp draws weights to the pretrained ones and optim.weight_decay draws the "
            "same weights to 0. Set optim.weight_decay=0."
        )
    return found


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


def find_moved(
    config: ConfigDict, begun: Path, train_split: sources.Split, teacher: Teacher | None
) -> dict[str, Any]:
    """Returns the fields that name what a run began with in another place than then.

    These are data.source, if the images to train on have the fingerprint that they had, and
    loss.teacher and model.pretrained, if the weights have the same hashes.

    Args:
      config: What is asked for.
      begun: The run's workdir.
      train_split: The split to train on.
      teacher: The teacher.

    Returns:
      The fields, model.pretrained with its files.

    Raises:
      UserError: there is nothing at the new place of the pretrained weights. Where they are given
        as they were, nothing is read: the workdir has its own.
    """
    saved, manifest = read_saved_config(begun / "config.json"), records.read_manifest(begun)
    moved: dict[str, Any] = {}
    fingerprint = records.recorded_fingerprints(begun).get(train_split.name)
    if config.data.source != saved.data.source and fingerprint == train_split.fingerprint:
        moved["data.source"] = None
    taught = teacher is not None and teacher.sha256 == manifest.get("teacher")
    if config.loss.teacher != saved.loss.teacher and taught:
        moved["loss.teacher"] = None
    asked, first = config.model.pretrained, manifest.get("pretrained")
    if asked != saved.model.pretrained and asked and first:
        try:
            files = pretrained.find(asked, allow_pickle=config.model.allow_pickle)
        except UserError as error:
            raise UserError(
                f"model.pretrained={asked!r} cannot be compared with what this run began with: "
                f"{error} Name {saved.model.pretrained!r}, as then, and nothing is read there."
            ) from error
        if _only_weights(files.sha256()) == _only_weights(first["sha256"]):
            moved["model.pretrained"] = files
    for field in moved:
        log.info("%s names another place than when this run began, with the same content.", field)
    return moved


def _only_weights(sha256: dict[str, str]) -> dict[str, str]:
    # What the JSON files say of network and preprocessing is in the workdir.
    return {name: digest for name, digest in sha256.items() if not name.endswith(".json")}


def warn_of_changed_splits(
    known: dict[str, str], splits: dict[str, sources.Split], *, select: str
) -> None:
    """Warns of every evaluated split that is not what it was.

    Args:
      known: The fingerprints of then by the splits' names.
      splits: By name, what is evaluated now.
      select: Name of the one that chooses the checkpoint.
    """
    for name, split in splits.items():
        if known.get(name, split.fingerprint) != split.fingerprint:
            log.warning(
                "Split %r has changed since it was last evaluated or described here: files or "
                "labels are not what they were, and it now has %d images. Earlier figures of it "
                "are not comparable%s.", name, len(split),
                ", and earlier checkpoints were scored on other images" if name == select else "",
            )  # fmt: skip


def check_same_data(fingerprint: str, split: sources.Split) -> None:
    """Raises `UserError` when the split is not the one with this fingerprint."""
    if fingerprint != split.fingerprint:
        raise UserError(
            f"The training data ({split.name}, {len(split)} images) is not what this run began "
            "with: files or labels changed. Use another --workdir, or restore the data."
        )


def check_same_teacher(sha256: str | None, teacher: Teacher | None) -> None:
    """Raises `UserError` when the teacher's weights are not those with this hash."""
    if sha256 != (teacher and teacher.sha256):
        raise UserError(
            "loss.teacher has other weights than when this run began. Restore them, or name one "
            "step of its workdir (DIR@STEP), or use another --workdir."
        )


def check_same_passes(num_passes: int, program: Program, config: ConfigDict) -> None:
    """Raises `UserError` when a step has another number of passes and that changes the result."""
    if trains_statistics(config, program) and num_passes != program.num_passes:
        raise UserError(
            f"This run began with {num_passes} passes per step and would go on with "
            f"{program.num_passes}: BatchNorm normalises each pass by itself. Choose "
            f"train.micro_batch and devices that make {num_passes}, or use another --workdir."
        )
