"""The check of a config: every mistake that shows without data, weights or devices."""

import itertools
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls.config.field import SET, Field
from vitcls.config.fields import FIELDS, default_config
from vitcls.config.parse import flatten, parse_fold, read_class_weights
from vitcls.errors import UserError, unknown

Flat = dict[str, Any]
# (fields, whether they have no effect, and why): conditions that `Field.needs` cannot express. A
# field that is 0 or "" is off and needs nothing.
_UNUSED: tuple[tuple[tuple[str, ...], Callable[[Flat], bool], str], ...] = (
    (("data.holdout",), lambda flat: bool(flat["data.fold"]), "data.fold says what is held out"),
    (
        ("data.holdout",),
        lambda flat: "holdout" not in (flat["eval.select_split"], *flat["data.eval_splits"]),
        "neither eval.select_split nor data.eval_splits is 'holdout'",
    ),
    (
        ("data.resize",),
        lambda flat: not _is_evaluated(flat) and flat["data.crop"] == "inception",
        "it is for evaluation and data.crop='resmall', and data.eval_splits and eval.select_split "
        "are empty",
    ),
    (
        ("eval.batch_size", "eval.tta", "stall.eval_secs"),
        lambda flat: not _is_evaluated(flat),
        "data.eval_splits and eval.select_split are empty",
    ),
    (
        ("loss.name", "loss.gamma", "loss.logit_adjustment", "loss.label_smoothing"),
        lambda flat: bool(flat["loss.teacher"]) and flat["loss.teacher_weight"] == 1,
        "loss.teacher_weight=1 leaves nothing of the loss against the labels",
    ),
    (
        ("adapt.layer_decay",),
        lambda flat: flat["adapt.train"] == "head" and not flat["adapt.lora_rank"],
        "the head, which alone is trained, has the factor 1",
    ),
    (
        ("optim.restarts",),
        lambda flat: flat["optim.schedule"] == "constant" and flat["optim.warmup_steps"] == 0,
        "optim.schedule='constant' without optim.warmup_steps has nothing to begin anew",
    ),
)


def _is_evaluated(flat: Flat) -> bool:
    return bool(flat["data.eval_splits"] or flat["eval.select_split"])


def check_config(config: ConfigDict) -> None:
    """Raises `UserError` for the first mistake that shows without data, weights or devices."""
    _check_names(config)
    flat = flatten(config)
    for name, field in FIELDS.items():
        # `optim.args` is a group, which is empty in a flat config.
        if name in flat:
            _check_value(name, field, flat[name])
    _check_pairs(config)
    _check_dependent(flat)
    _check_adapt(config)
    _check_schedule(config)
    _check_combinations(config)


def _check_names(config: ConfigDict) -> None:
    known = default_config()
    for group in config:
        if group not in known:
            raise unknown("config group", group, known)
        if not isinstance(config[group], ConfigDict):
            raise UserError(f"config.{group} is a group of fields; set one of them.")
        for field, value in config[group].items():
            if field not in known[group]:
                raise unknown(f"field of config.{group}", field, known[group])
            default = known[group][field]
            if default is not None and isinstance(default, str) != isinstance(value, str):
                raise UserError(f"{group}.{field}={value!r} must be like {default!r}.")


def _check_value(name: str, field: Field, value: Any) -> None:
    if field.among and value not in field.among:
        raise unknown(f"value of {name}", value, field.among)
    if field.at_least is not None and value is not None:
        too_high = value >= field.below if field.at_most is None else value > field.at_most
        if not value >= field.at_least or too_high:
            raise UserError(f"{name}={value} is out of range: it must be {bounds(field)}.")
    if field.is_pattern:
        _check_pattern(name, value)


def bounds(field: Field) -> str:
    """Returns the range of a number in words."""
    highest, end = (field.below, "below") if field.at_most is None else (field.at_most, "at most")
    return f"at least {field.at_least}" + (f" and {end} {highest}" if highest < math.inf else "")


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}={pattern!r} is not a regular expression: {error}.") from error


def _check_dependent(flat: Flat) -> None:
    if unused := unused_fields(flat):
        field, why = next(iter(unused.items()))
        default = FIELDS[field].value
        default = "unset" if default is None else f"at {default!r}"
        raise UserError(
            f"{field}={flat[field]!r} has no effect: {why}, or leave {field} {default}."
        )


def unused_fields(flat: Flat) -> dict[str, str]:
    """Returns the fields, away from their defaults, that others leave without effect, and why."""
    unused = {}
    for name, field in FIELDS.items():
        for other, value in field.needs.items():
            if not (flat[other] if value is SET else flat[other] == value):
                needed = other if value is SET else f"{other}={value!r}"
                unused.setdefault(name, f"it needs {needed}, and that is {flat[other]!r}. Set it")
    for fields, is_unused, why in _UNUSED:
        if is_unused(flat):
            unused = {field: f"{why}. Change that" for field in fields if flat[field]} | unused
    return {
        name: why
        for name, why in unused.items()
        if flat[name] is not None and flat[name] != FIELDS[name].value
    }


def drop_unused(config: ConfigDict, *, given: Collection[str]) -> None:
    """Resets fields without effect to their defaults, except those in `given`.

    A recipe may set a field that an override leaves without effect, which is not a mistake. Fields
    given on the command line are checked by `check_config`.
    """
    flat = flatten(config)
    # A config without all fields is not ours, which `check_config` says.
    if not set(flatten(default_config())) <= set(flat):
        return
    for name in set(unused_fields(flat)) - set(given):
        group, field = name.split(".")
        with config.ignore_type():
            config[group][field] = FIELDS[name].value


def _check_adapt(config: ConfigDict) -> None:
    fields = config.adapt
    for pair in fields.lr_scale:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        if not is_pair or not isinstance(pair[1], int | float) or not 0 < pair[1] < math.inf:
            raise UserError(
                f"adapt.lr_scale={fields.lr_scale} must be pairs of a regular expression and a "
                "factor above 0, (('embeddings/.*', 0.1),); for a factor of 0 use adapt.freeze."
            )
        _check_pattern("adapt.lr_scale", pair[0])
    if not fields.layer_decay:
        raise UserError(
            "adapt.layer_decay=0 trains nothing below the head; use adapt.train='head'."
        )
    if fields.probe_steps and fields.train == "head":
        raise UserError(
            f"adapt.probe_steps={fields.probe_steps} with adapt.train='head': nothing else is "
            "trained after them; set one of the two."
        )
    if fields.l2_sp and not config.model.pretrained:
        raise UserError(
            f"adapt.l2_sp={fields.l2_sp} pulls to the pretrained weights, but model.pretrained is "
            "empty; use optim.weight_decay."
        )
    if fields.l2_sp and fields.lora_rank:
        raise UserError(
            f"adapt.l2_sp={fields.l2_sp} with adapt.lora_rank={fields.lora_rank}: LoRA keeps the "
            "pretrained kernels as they are; set one of the two."
        )


def _check_schedule(config: ConfigDict) -> None:
    fields = config.optim
    if not all(isinstance(step, int) and step > 0 for step in fields.restarts):
        raise UserError(f"optim.restarts={fields.restarts} must be steps above 0: (1000,).")


def _check_pairs(config: ConfigDict) -> None:
    size = config.data.image_size
    if size is not None and not (
        len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise UserError(f"data.image_size={size} must be (height, width) in pixels: (224, 224).")
    for field, highest in [("crop_scale", 1.0), ("crop_ratio", math.inf)]:
        pair = config.data[field]
        is_pair = len(pair) == 2 and all(isinstance(end, int | float) for end in pair)
        if not is_pair or not 0 < pair[0] <= pair[1] <= highest:
            raise UserError(
                f"data.{field}={pair} must be (smallest, largest), both above 0"
                + (f" and at most {highest}." if highest < math.inf else ".")
            )


def _check_combinations(config: ConfigDict) -> None:
    data, augment, model, train = config.data, config.augment, config.model, config.train
    if not data.source:
        raise UserError('data.source is empty; set it, for example to "digits" or "tfds:cifar10".')
    if config.eval.tta == "flip" and not augment.flip:
        raise UserError(
            "eval.tta='flip' shows mirror images, which augment.flip=False keeps from training; "
            "change one of the two."
        )
    if bool(model.pretrained) == bool(model.arch):
        raise UserError(
            f"model.pretrained={model.pretrained!r} and model.arch={model.arch!r}: set exactly "
            "one, pretrained to start from a checkpoint, arch to start from random weights."
        )
    if model.arch and model.head == "keep":
        raise UserError("model.head='keep' needs model.pretrained: random weights have no head.")
    if model.arch and data.image_size is None:
        raise UserError("data.image_size must be set when model.arch starts from random weights.")
    if bool(train.total_steps) == bool(train.total_epochs):
        raise UserError(
            f"train.total_steps={train.total_steps} and train.total_epochs={train.total_epochs}: "
            "exactly one must be positive; set the other to 0."
        )
    if train.total_steps:
        check_num_steps(config)
    if data.crop == "resmall" and not data.resize:
        raise UserError("data.crop='resmall' needs data.resize, the shorter side before the crop.")
    if data.cache not in ("", "ram") and not Path(data.cache).expanduser().is_dir():
        raise UserError(
            f"data.cache={data.cache!r} is neither 'ram' nor a folder that exists; make it first, "
            "on a disk with room for the decoded images."
        )
    if data.cache == "ram" and data.num_workers:
        raise UserError(
            f"data.cache='ram' with data.num_workers={data.num_workers} would keep the images "
            "once per worker; set data.num_workers=0, or data.cache to a folder, which is shared."
        )
    if data.fold:
        parse_fold(data.fold)
        if "holdout" not in (config.eval.select_split, *data.eval_splits):
            raise UserError(
                f"data.fold={data.fold!r} holds out images that are never evaluated: set "
                "eval.select_split='holdout', or have 'holdout' in data.eval_splits."
            )
    if 0 < data.long_tail < 1:
        raise UserError(
            f"data.long_tail={data.long_tail} must be the largest class by the smallest, 1 or "
            "more; 0 takes all images."
        )
    if data.long_tail and data.per_class:
        raise UserError(
            f"data.long_tail={data.long_tail} and data.per_class={data.per_class}: classes cannot "
            "be of one size and fall off; set one of the two to 0."
        )
    if config.loss.name == "sigmoid" and config.loss.logit_adjustment:
        raise UserError(
            f"loss.logit_adjustment={config.loss.logit_adjustment} corrects a softmax, and "
            "loss.name='sigmoid' has none; use 'cross_entropy', or loss.class_weights."
        )
    read_class_weights(config.loss.class_weights)
    if config.loss.teacher and not config.loss.teacher_weight:
        raise UserError(
            f"loss.teacher={config.loss.teacher!r} has no effect: loss.teacher_weight=0 leaves "
            "nothing of it. Change that, or leave both at their defaults."
        )
    if config.eval.select_split == "holdout" and not (data.holdout or data.fold):
        raise UserError(
            "eval.select_split='holdout' but data.holdout=0: hold a share out, or name a "
            "validation split, or set eval.select_split='' to keep the last step."
        )
    if config.eval.select_split in data.eval_splits:
        raise UserError(
            f"eval.select_split={config.eval.select_split!r} is also in data.eval_splits: a split "
            "that chooses the checkpoint cannot measure it. Select on 'holdout'."
        )


def check_num_steps(config: ConfigDict) -> None:
    """Raises `UserError` when `train.total_steps` has no room for probe, warm-up and restarts."""
    total_steps, restarts = config.train.total_steps, config.optim.restarts
    probe_steps, warmup_steps = config.adapt.probe_steps, config.optim.warmup_steps or 0
    if probe_steps and probe_steps >= total_steps:
        raise UserError(
            f"adapt.probe_steps={probe_steps} leaves nothing of the {total_steps} steps of "
            "training; for a linear probe alone use adapt.train='head'."
        )
    if warmup_steps > total_steps - probe_steps:
        after = f" that follow adapt.probe_steps={probe_steps}" if probe_steps else ""
        raise UserError(
            f"optim.warmup_steps={warmup_steps} is more than the {total_steps - probe_steps} steps "
            f"of training{after}."
        )
    if any(length <= warmup_steps for length in cycle_lengths(config)) and restarts:
        raise UserError(
            f"optim.restarts={restarts} must be rising steps below train.total_steps="
            f"{total_steps}, each more than optim.warmup_steps={warmup_steps} after the one "
            f"before{f' and after adapt.probe_steps={probe_steps}' if probe_steps else ''}."
        )


def cycle_lengths(config: ConfigDict) -> list[int]:
    """Returns the steps from each start of the schedule to its end."""
    ends = [config.adapt.probe_steps, *config.optim.restarts, config.train.total_steps]
    return [end - start for start, end in itertools.pairwise(ends)]
