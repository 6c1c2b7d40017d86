"""The configuration: every field with its default and meaning, and the check of all of them.

A recipe (`configs/*.py`) starts from `default_config()` and sets what it needs. `check_config`
finds every mistake that can be found without data, weights or devices.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vitcls.errors import UserError, unknown
from vitcls.files import read_json


def default_config() -> ConfigDict:
    """Returns every field with its default; recipes fill in what they need."""
    c = ConfigDict()

    c.data = ConfigDict()
    # What to train on: "digits", "glyphs", "tfds:NAME[/CONFIG]", "hf:ID_OR_PATH", "csv:PATH", or
    # "folder:PATH" with PATH/split/class/image or PATH/class/image. Of files without splits, a
    # fifth is the test split.
    c.data.source = ""
    # Where prepared data sets are kept; "" is tensorflow_datasets' own default.
    c.data.data_dir = ""
    # Split to train on; of tfds, slices work, for example "train[:90%]".
    c.data.train_split = "train"
    # Splits evaluated once, at the end, with the selected weights.
    c.data.eval_splits = ("test",)
    # Share of the training split held out (stratified, seeded) as the split "holdout", if
    # eval.select_split or data.eval_splits name it; 0: there is no such split.
    c.data.holdout = 0.1
    # "2/5" holds out the second of five folds instead, whatever data.holdout says: runs with the
    # same train.seed and 1/5 to 5/5 hold out every image of the training split once.
    c.data.fold = ""
    # How images are chosen for the test split of data without splits, the hold-out, folds and
    # samples: by a "hash" of their ids, so that one more file moves at most one other; or by their
    # "position" in the listing, as versions before this field did. "": as the workdir's run began,
    # and by hash in a new one.
    c.data.division = ""
    # Training images per class, drawn with train.seed after the hold-out; 0: all.
    c.data.per_class = 0
    # Long tail: training images of the first class for each one of the last, their numbers falling
    # off exponentially in between; drawn with train.seed after the hold-out; 0: all images.
    c.data.long_tail = 0.0
    # Which training images come when: "uniform" (each once per epoch), or drawn with replacement,
    # classes equally often ("balanced") or by the square root of their numbers of images ("sqrt").
    # An epoch is as many images either way.
    c.data.sampling = "uniform"
    # An image that cannot be decoded: "raise" stops the run and names it; "skip" leaves it out,
    # counts it and lists it in skipped.jsonl, and stops when it is more than half of a split.
    c.data.on_error = "raise"
    # Keep decoded images, at 3 bytes per pixel: "ram", from their first use on; or a folder on a
    # local disk, decoded there before training and shared by all runs that use it, until somebody
    # deletes PATH/vitcls-cache; "": decode every time. Batches are the same, unless images are
    # replaced by others under the same names and with the same sizes of files: then delete it.
    c.data.cache = ""
    # (height, width) the network sees, in pixels; unset: the checkpoint's.
    c.data.image_size = placeholder(tuple)
    # Random crop for training: "inception" (random area and aspect), "resmall" (shorter side to
    # data.resize, then a random window) or "none" (the evaluation's pixels).
    c.data.crop = "inception"
    # Share of the area that an inception crop covers, (smallest, largest).
    c.data.crop_scale = (0.05, 1.0)
    # Width / height of an inception crop, (smallest, largest), relative to the image's own.
    c.data.crop_ratio = (3 / 4, 4 / 3)
    # Shorter side in pixels before cropping, in evaluation (central crop) and for "resmall";
    # 0: evaluate as the checkpoint's preprocessing says.
    c.data.resize = 0
    # Threads that read and decode, per process; of more than two for each processor, two are used.
    c.data.num_threads = 8
    # Worker processes beside the training process; 0: threads only, which is mostly enough.
    c.data.num_workers = 0

    c.augment = ConfigDict()
    # Mirror left and right with probability 1/2; leave off where mirrored classes differ.
    c.augment.flip = True
    # Turn upside down with probability 1/2: for images without an up, as from above.
    c.augment.vertical_flip = False
    # Rotate by up to this many degrees, drawn evenly in both directions; corners become grey.
    c.augment.rotation = 0.0
    # "randaugment" (timm's rand-m{magnitude}-n{num_ops}-mstd0.5-inc1), "trivialaugment"
    # (torchvision's wide one) or "none"; bilinear, with grey from outside the image.
    c.augment.policy = "none"
    # Of randaugment: operations per image, of which each is done with probability 1/2.
    c.augment.num_ops = 2
    # Of randaugment: strength of the operations, from 0 to 10.
    c.augment.magnitude = 9.0
    # Change brightness, contrast and saturation, each by a factor from 1 - this to 1 + this.
    c.augment.color_jitter = 0.0
    # Mix images and targets of pairs by Mixup or CutMix, their shares drawn from Beta(this, this);
    # 0: off. With both on each pair takes one of them, with probability 1/2.
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    # Probability that a box, 2 to 33 % of the image, becomes noise (random erasing).
    c.augment.erasing = 0.0

    c.model = ConfigDict()
    # Checkpoint to start from: Hugging Face id with optional @revision, or a folder; "": random
    # weights of model.arch.
    c.model.pretrained = ""
    # Read torch's pickles (pytorch_model.bin) where model.pretrained has nothing else: needs torch,
    # whose restricted unpickler keeps them from running code.
    c.model.allow_pickle = False
    # Architecture for random weights, such as "vit_b16" or "resnet50"; must be "" when
    # model.pretrained is set.
    c.model.arch = ""
    # "new": zero head for the data's classes; "keep": the checkpoint's head and class names.
    c.model.head = "new"
    # Type of the computation: "float32" or "bfloat16"; parameters are always float32.
    c.model.dtype = "float32"
    # Of a ResNet: "train" normalises with the statistics of the global batch and moves the running
    # ones, also below layers that adapt.freeze keeps; "frozen" uses the running ones as they are.
    # Scales and biases are parameters either way.
    c.model.batch_norm = "train"
    # What is kept of every layer for the backward pass, the rest being computed again: "none" (no
    # such saving) keeps all, "dots" the results of products and convolutions, "full" a layer's
    # input only. Up to rounding the result is the same. For accelerators: on CPU it saves nothing.
    c.model.remat = "none"
    # Of a ViT: what computes attention. "xla", or "cudnn": flash attention on NVIDIA's GPUs, in
    # bfloat16, which keeps no scores in memory. Up to rounding the result is the same.
    c.model.attention = "xla"
    # Of a ViT: dropout rate of the token stream.
    c.model.dropout = 0.0
    # Of a ViT: stochastic depth, the rate at which the last block's branches are dropped, rising
    # from 0.
    c.model.drop_path = 0.0
    # Of a ViT: PatchDropout, the share of the patches that a training step leaves out, others for
    # every image; a step's time and memory fall with it.
    c.model.patch_dropout = 0.0

    c.optim = ConfigDict()
    # An optimizer of optax or optax.contrib, by the name of its function.
    c.optim.name = "adamw"
    # Peak learning rate.
    c.optim.lr = 1e-4
    # Batch size that optim.lr and adapt.probe_lr are meant for: they are multiplied by
    # train.global_batch_size / this. 0: taken as they are.
    c.optim.lr_batch_size = 0
    # Decoupled for optimizers that have it (adamw, lion, ...), otherwise added to the gradient.
    c.optim.weight_decay = 0.0
    # Regular expression for the names of the parameters that weight_decay applies to.
    c.optim.decay = r".*/kernel"
    # Global norm that gradients are clipped to; 0: no clipping.
    c.optim.clip_norm = 1.0
    # After the warm-up: "cosine" or "linear" to 0, "constant", or "step", divided by 10 at 30, 60
    # and 90 % of all steps.
    c.optim.schedule = "cosine"
    # Steps of linear warm-up from 0. Unset: a tenth of the steps and at most 500; with fewer than
    # 20 000 training images a fifth and at most 100. A run that is continued keeps its own.
    c.optim.warmup_steps = 0
    # Steps at which the schedule ends and begins anew, with its warm-up: (1000,) for a run that was
    # planned for 1000 steps, when it is first continued to 2000. Without it a longer run jumps to
    # the rate that it would have had if it had been planned so from the start.
    c.optim.restarts = ()
    # Decay of the exponential moving average of the weights, which is then what is evaluated;
    # 0: no average.
    c.optim.ema_decay = 0.0
    # Further arguments of the optax optimizer, for example momentum = 0.9 for sgd.
    c.optim.args = ConfigDict()

    c.loss = ConfigDict()
    # "cross_entropy"; "focal", which counts the images that are already right for less; or
    # "sigmoid", one binary cross-entropy per class, summed. Evaluation reports plain cross-entropy.
    c.loss.name = "cross_entropy"
    # Of "focal": the power of (1 - probability); 0 is cross-entropy.
    c.loss.gamma = 2.0
    # Weights of images by their class: "none"; "balanced", 1 / images of the class; "effective",
    # which levels off for frequent classes; or a weight for every class name, as a JSON object or
    # the path of a file with one. Batches are divided by the sum of their weights.
    c.loss.class_weights = "none"
    # Of "effective": 0 is no weighting, towards 1 it becomes "balanced".
    c.loss.beta = 0.9999
    # Add this times the logarithm of a class' share of the training images to its logit, in
    # training only, so that rare classes are predicted more often; 1 is balanced softmax, 0: none.
    c.loss.logit_adjustment = 0.0
    # Share of the target spread evenly over all classes.
    c.loss.label_smoothing = 0.0
    # Distillation: checkpoint to learn from (workdir, folder or hub id) that has the data's classes
    # by name; it sees the same images, as they are augmented and mixed. "": none.
    c.loss.teacher = ""
    # Share of the loss that draws to the teacher; the rest is the loss against the labels.
    c.loss.teacher_weight = 0.5
    # What both networks' logits are divided by for it.
    c.loss.temperature = 1.0

    c.adapt = ConfigDict()
    # What is trained, along with the head: "all"; "head" alone, a linear probe; "attention" or
    # "bias"; or a regular expression for the names of the parameters. "": all, or with
    # adapt.lora_rank the head. Names, and what is trained, are in the log.
    c.adapt.train = ""
    # Regular expression for the names of the parameters that stay as they are, whatever adapt.train
    # says; "": none.
    c.adapt.freeze = ""
    # Factors of the learning rate for names that match a regular expression, all that match:
    # ((r"embeddings/.*", 0.1), (r"classifier/.*", 10.0)), for example.
    c.adapt.lr_scale = ()
    # Factor of the learning rate from a layer, of a ResNet a stage, to the one below; 1: none.
    c.adapt.layer_decay = 1.0
    # Steps in which only the head is trained, of train.total_steps; the others then start the
    # optimizer and its schedule anew.
    c.adapt.probe_steps = 0
    # Constant learning rate of these steps; unset: optim.lr.
    c.adapt.probe_lr = placeholder(float)
    # Instead of kernels train products of this rank, added to them (LoRA); 0: none.
    c.adapt.lora_rank = 0
    # What is added is multiplied by this / lora_rank; unset: by 1.
    c.adapt.lora_alpha = placeholder(float)
    # Regular expression for the names of the kernels that LoRA adds to.
    c.adapt.lora_targets = r".*/attention/.*/kernel"
    # Rate at which pretrained parameters are drawn back to what they were (L2-SP), added to the
    # gradient, and at which a new head is drawn to 0. Both are off where the first is 0.
    c.adapt.l2_sp = 0.0
    c.adapt.l2_sp_head = 0.01

    c.train = ConfigDict()
    # Length of training: exactly one of the two is positive. It may grow when a run is continued.
    c.train.total_steps = 0
    c.train.total_epochs = 0.0
    # Images per step over all devices.
    c.train.global_batch_size = 128
    # Images per device and pass, at most: a step takes its batch in equal passes, in the memory of
    # one, and sums their gradients. Up to rounding the result is the same, but for a trained
    # BatchNorm, which normalises each pass by itself. Unset: one pass. 0: the largest passes that
    # fit into the devices' memory, except with a trained BatchNorm; a run that is continued keeps
    # what was chosen.
    c.train.micro_batch = placeholder(int)
    # Seed of everything random: hold-out, order, crops, augmentation, dropout, new weights.
    c.train.seed = 0
    # Steps in a row whose loss or gradient is not finite, at which the run stops with exit code 87.
    # Such steps change nothing, are counted, and are listed with their images in nonfinite.jsonl.
    c.train.max_nonfinite = 5
    # On a GPU, only operations that give the same bits every time, as XLA's flag
    # --xla_gpu_deterministic_ops: without it a run that was stopped and continued differs in the
    # last digits. It costs speed, how much depends on network and GPU: compare
    # train/images_per_second. Elsewhere bits are the same anyway, and it changes nothing.
    c.train.deterministic = False

    c.eval = ConfigDict()
    # Steps between evaluations of select_split, each with a checkpoint; 0: only at the end. Unset:
    # a tenth of the steps, but at least 50. A run that is continued keeps its own.
    c.eval.every_steps = 0
    # Split that chooses the best checkpoint: "holdout", or a split of the source that is not
    # in data.eval_splits; "": no choice, the last step is final.
    c.eval.select_split = "holdout"
    # Metric that chooses: see SELECT_METRICS below.
    c.eval.select_metric = "accuracy"
    # Images per evaluation step over all devices; 0: train.global_batch_size.
    c.eval.batch_size = 0
    # "flip": the mean of the logits of each image and its mirror image, at twice the cost; "none".
    c.eval.tta = "none"

    c.checkpoint = ConfigDict()
    # Steps between checkpoints, beside those at evaluations and at the end; 0: only those.
    c.checkpoint.every_steps = 0
    # Number of newest checkpoints to keep, of which one is left when another is found damaged; the
    # best one is kept besides.
    c.checkpoint.keep = 2

    c.mesh = ConfigDict()
    # Devices along the data axis; -1: all that mesh.fsdp leaves.
    c.mesh.data = -1
    # Devices over which each large parameter is split (fully sharded data parallel).
    c.mesh.fsdp = 1

    # Seconds after which a process that makes no progress is taken to be stuck and ended, with the
    # place where each of its threads is; 0: never.
    c.stall = ConfigDict()
    # For the first step of training or of an evaluation, with its compilation.
    c.stall.compile_secs = 3600.0
    # For a step of training, with the wait for its batch.
    c.stall.step_secs = 900.0
    # For a step of an evaluation, and for what is made of all of them.
    c.stall.eval_secs = 900.0
    # For writing a checkpoint.
    c.stall.save_secs = 3600.0

    c.log = ConfigDict()
    # Steps between lines of metrics.
    c.log.every_steps = 10
    # Project of Weights & Biases that shows the metrics, too, as one run however often it is
    # started again; "": none. All else is by its own variables: WANDB_ENTITY, WANDB_MODE=offline.
    c.log.wandb_project = ""
    return c


# Fields that may differ when a workdir is continued: they do not change what is computed. For those
# that may only grow see `check_same_run`.
RUN_FIELDS = (
    "data.data_dir", "data.cache", "data.num_threads", "data.num_workers", "model.allow_pickle",
    "model.remat", "train.micro_batch", "train.max_nonfinite", "train.deterministic",
    "eval.batch_size", "checkpoint.every_steps", "checkpoint.keep", "mesh.data", "mesh.fsdp",
    "stall.compile_secs", "stall.step_secs", "stall.eval_secs", "stall.save_secs",
    "log.every_steps", "log.wandb_project",
)  # fmt: skip
SELECT_METRICS = (
    "accuracy",
    "balanced_accuracy",
    "top5_accuracy",
    "loss",
    "macro_precision",
    "macro_recall",
    "macro_f1",
)
REMATS = ("none", "dots", "full")  # of model.remat, the cheapest first
_CHOICES = {
    "data.division": ("", "hash", "position"),
    "data.crop": ("inception", "resmall", "none"),
    "data.on_error": ("raise", "skip"),
    "data.sampling": ("uniform", "sqrt", "balanced"),
    "augment.policy": ("none", "randaugment", "trivialaugment"),
    "model.head": ("new", "keep"),
    "model.batch_norm": ("train", "frozen"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("xla", "cudnn"),
    "model.remat": REMATS,
    "optim.schedule": ("cosine", "linear", "constant", "step"),
    "loss.name": ("cross_entropy", "focal", "sigmoid"),
    "eval.select_metric": SELECT_METRICS,
    "eval.tta": ("none", "flip"),
}
# (field, the one that gives it a meaning, and the value that does; None: all but 0 and "")
_DEPENDENT = (
    ("data.crop_scale", "data.crop", "inception"),
    ("data.crop_ratio", "data.crop", "inception"),
    ("augment.num_ops", "augment.policy", "randaugment"),
    ("augment.magnitude", "augment.policy", "randaugment"),
    ("model.allow_pickle", "model.pretrained", None),
    ("optim.decay", "optim.weight_decay", None),
    ("loss.gamma", "loss.name", "focal"),
    ("loss.beta", "loss.class_weights", "effective"),
    ("loss.teacher_weight", "loss.teacher", None),
    ("loss.temperature", "loss.teacher", None),
    ("adapt.probe_lr", "adapt.probe_steps", None),
    ("adapt.lora_alpha", "adapt.lora_rank", None),
    ("adapt.lora_targets", "adapt.lora_rank", None),
    ("adapt.l2_sp_head", "adapt.l2_sp", None),
    ("adapt.l2_sp_head", "model.head", "new"),
    ("eval.select_metric", "eval.select_split", None),
    ("eval.every_steps", "eval.select_split", None),
)
Flat = dict[str, Any]
# (fields, whether they have no effect, and why): what one other field does not say. A field that is
# 0 or "" is off, and asks for nothing.
_UNUSED: tuple[tuple[tuple[str, ...], Callable[[Flat], bool], str], ...] = (
    (
        ("data.holdout",),
        lambda flat: bool(flat["data.fold"]),
        "data.fold says what is held out",
    ),
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


# field -> (lowest, highest, whether the highest itself is allowed)
_RANGES = {
    "data.holdout": (0, 1, False),
    "data.per_class": (0, math.inf, True),
    "data.long_tail": (0, math.inf, False),
    "data.resize": (0, math.inf, True),
    "data.num_threads": (1, math.inf, True),
    "data.num_workers": (0, math.inf, True),
    "augment.rotation": (0, 180, True),
    "augment.num_ops": (1, math.inf, True),
    "augment.magnitude": (0, 10, True),
    "augment.color_jitter": (0, 1, True),
    "augment.mixup": (0, math.inf, False),
    "augment.cutmix": (0, math.inf, False),
    "augment.erasing": (0, 1, True),
    "model.dropout": (0, 1, False),
    "model.drop_path": (0, 1, False),
    "model.patch_dropout": (0, 1, False),
    "optim.lr": (0, math.inf, False),
    "optim.lr_batch_size": (0, math.inf, True),
    "optim.weight_decay": (0, math.inf, False),
    "optim.clip_norm": (0, math.inf, False),
    "optim.warmup_steps": (0, math.inf, True),
    "optim.ema_decay": (0, 1, False),
    "loss.gamma": (0, math.inf, False),
    "loss.beta": (0, 1, False),
    "loss.logit_adjustment": (0, math.inf, False),
    "loss.label_smoothing": (0, 1, False),
    "loss.teacher_weight": (0, 1, True),
    "loss.temperature": (1e-3, math.inf, False),
    "adapt.layer_decay": (0, 1, True),
    "adapt.probe_steps": (0, math.inf, True),
    "adapt.probe_lr": (0, math.inf, False),
    "adapt.lora_rank": (0, math.inf, True),
    "adapt.lora_alpha": (0, math.inf, False),
    "adapt.l2_sp": (0, math.inf, False),
    "adapt.l2_sp_head": (0, math.inf, False),
    "train.total_steps": (0, math.inf, True),
    "train.total_epochs": (0, math.inf, False),
    "train.global_batch_size": (1, math.inf, True),
    "train.micro_batch": (0, math.inf, True),
    "train.seed": (0, 2**32, False),
    "train.max_nonfinite": (1, math.inf, True),
    "eval.every_steps": (0, math.inf, True),
    "eval.batch_size": (0, math.inf, True),
    "checkpoint.every_steps": (0, math.inf, True),
    "checkpoint.keep": (1, math.inf, True),
    "mesh.fsdp": (1, math.inf, True),
    "stall.compile_secs": (0, math.inf, True),
    "stall.step_secs": (0, math.inf, True),
    "stall.eval_secs": (0, math.inf, True),
    "stall.save_secs": (0, math.inf, True),
    "log.every_steps": (1, math.inf, True),
}


def parse_arg(arg: str, **defaults: str) -> dict[str, str]:
    """Reads a config file's argument, `name=value,name=value`.

    Args:
      arg: What follows the colon in `--config=FILE.py:ARG`.
      **defaults: The names that are known and their values when not given.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, equals, value = item.partition("=")
        if name not in defaults:
            raise unknown("argument of the config file", name, defaults)
        if not equals:
            raise UserError(f"The config file's argument {item!r} is not of the form name=value.")
        values[name] = value
    return values


def parse_fold(fold: str) -> tuple[int, int]:
    """Returns (2, 5) for "2/5"; raises `UserError` for what is no fold."""
    number, _, num_folds = fold.partition("/")
    if not (number.isdecimal() and num_folds.isdecimal() and 1 <= int(number) <= int(num_folds)):
        raise UserError(f"data.fold={fold!r} must be NUMBER/FOLDS: '1/5', '2/5', ... '5/5'.")
    if int(num_folds) < 2:
        raise UserError(f"data.fold={fold!r} holds everything out; use two folds or more.")
    return int(number), int(num_folds)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns `{"group.field": value}`; optimizer arguments as `optim.args.NAME`."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{name}.{key}": inner for key, inner in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def check_config(config: ConfigDict) -> None:
    """Raises `UserError` for the first mistake that shows without data, weights or devices."""
    _check_names(config)
    flat = flatten(config)
    for field, choices in _CHOICES.items():
        if flat[field] not in choices:
            raise unknown(f"value of {field}", flat[field], choices)
    for field, (low, high, closed) in _RANGES.items():
        value = flat[field]
        if value is None:
            continue
        if not low <= value <= high or (value == high and not closed):
            end = "at most" if closed else "below"
            bound = f"at least {low}" + (f" and {end} {high}" if high < math.inf else "")
            raise UserError(f"{field}={value} is out of range: it must be {bound}.")
    _check_pairs(config)
    for field in ("optim.decay", "adapt.train", "adapt.freeze", "adapt.lora_targets"):
        _check_pattern(field, flat[field])
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


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}={pattern!r} is no regular expression: {error}.") from error


def _check_dependent(flat: Flat) -> None:
    if unused := unused_fields(flat):
        field, why = next(iter(unused.items()))
        default = flatten(default_config())[field]
        default = "unset" if default is None else f"at {default!r}"
        raise UserError(
            f"{field}={flat[field]!r} has no effect: {why}, or leave {field} {default}."
        )


def unused_fields(flat: Flat) -> dict[str, str]:
    """Returns the fields, away from their defaults, that others leave without effect, and why."""
    unused = {}
    for field, other, value in _DEPENDENT:
        if not (flat[other] == value if value else flat[other]):
            needed = f"{other}={value!r}" if value else other
            unused.setdefault(field, f"it needs {needed}, and that is {flat[other]!r}. Set it")
    for fields, is_unused, why in _UNUSED:
        if is_unused(flat):
            unused = {field: f"{why}. Change that" for field in fields if flat[field]} | unused
    defaults = flatten(default_config())
    return {
        field: why
        for field, why in unused.items()
        if flat[field] is not None and flat[field] != defaults[field]
    }


def drop_unused(config: ConfigDict, *, given: Collection[str]) -> None:
    """Sets what others leave without effect to its default, but for the fields in `given`.

    A recipe may set what an override then makes void: that is nobody's mistake. What is given on
    the command line is checked by `check_config`.
    """
    flat, defaults = flatten(config), flatten(default_config())
    if not set(defaults) <= set(flat):  # not a config of ours, which `check_config` says
        return
    for name in set(unused_fields(flat)) - set(given):
        group, field = name.split(".")
        with config.ignore_type():
            config[group][field] = defaults[name]


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
            f"adapt.l2_sp={fields.l2_sp} draws to the pretrained weights, but model.pretrained is "
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
                f"data.fold={data.fold!r} holds out images that nobody looks at: set "
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


def read_class_weights(how: str) -> str:
    """Returns `loss.class_weights` with a file's content, on one line, in place of its path.

    Raises:
      UserError: it is no name, and no JSON object of weights.
    """
    if how in ("none", "balanced", "effective"):
        return how
    path = Path(how).expanduser()
    try:
        table = json.loads(how if how.lstrip().startswith("{") else path.read_text())
        is_table = all(0 <= weight < math.inf for weight in table.values()) and any(table.values())
    except (OSError, ValueError, TypeError, AttributeError):  # no file, JSON, number, object
        is_table = False
    if not is_table:
        raise UserError(
            f"loss.class_weights={how[:80]!r} is none of none, balanced, effective, and no JSON "
            'object of weights from 0 on, such as {"cat": 1, "dog": 2.5}, nor a file with one.'
        )
    return json.dumps(table)


def read_saved_config(path: Path) -> ConfigDict:
    """Reads a run's `config.json`, in which fields that are newer than it have their defaults.

    Raises:
      UserError: it is missing, empty or cut, or is not a config.
    """
    remedy = "put it back, or use another --workdir"
    what = "the config of a run that has checkpoints"
    saved = read_json(path, what=what, remedy=remedy)
    try:
        return restore_config(saved)
    except (ValueError, AttributeError, TypeError) as error:  # JSON, but of another kind
        raise UserError(f"{path}, {what}, cannot be read ({error}): {remedy}.") from error


def restore_config(saved: dict[str, Any]) -> ConfigDict:
    """Returns the config of a run, of which `saved` is the content of its `config.json`."""
    config = default_config()
    with config.ignore_type():  # JSON has lists for tuples
        config.update(saved)
    if "division" not in saved.get("data", {}):
        config.data.division = "position"  # what there was before the field
    return config


def check_same_run(config: ConfigDict, path: Path, *, moved: Collection[str] = ()) -> None:
    """Raises `UserError` when the run saved at `path` was started with other identity fields.

    Args:
      config: What is asked for. An empty data.division asks for that of the run.
      path: Of the saved config.
      moved: Fields that may differ, since they name the same content in another place.
    """
    asked, saved = (
        flatten(ConfigDict(json.loads(json.dumps(one.to_dict()))))
        for one in (config, read_saved_config(path))
    )
    asked["data.division"] = asked["data.division"] or saved["data.division"]
    unused = unused_fields(saved) | unused_fields(asked)
    differences = [
        f"  {field}: {saved.get(field)!r} there, {asked.get(field)!r} asked for"
        for field in sorted(saved.keys() | asked.keys())
        if field not in (*RUN_FIELDS, *moved, *unused) and saved.get(field) != asked.get(field)
        and not _may_differ(field, saved, asked)
    ]  # fmt: skip
    if differences:
        raise UserError(
            f"{path.parent} holds a run of another config:\n"
            + "\n".join(differences)
            + "\nUse another --workdir, or the fields it was started with."
        )


def _may_differ(field: str, saved: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a field is left open, or differs only in what comes after the planned steps."""
    before, after = saved.get(field), asked.get(field)
    if field in ("optim.warmup_steps", "eval.every_steps"):
        return after is None
    if field in ("train.total_steps", "train.total_epochs"):
        return 0 < before < after
    if field == "optim.restarts":
        kept, added = after[: len(before)], after[len(before) :]
        return kept == before and all(step >= saved["train.total_steps"] for step in added)
    return False
