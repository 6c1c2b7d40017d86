"""Every field of the configuration, one row each.

A recipe (`configs/*.py`) starts from `default_config()` and sets what it needs. To add a field, add
its row here and read it where it has its effect. `python -m vitcls.config` prints all of them.
"""

import math

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vitcls.config.field import SET, Field

SELECT_METRICS = (
    "accuracy", "balanced_accuracy", "top5_accuracy", "loss", "macro_precision", "macro_recall",
    "macro_f1",
)  # fmt: skip
REMATS = ("none", "dots", "full")  # From the least computation to the least memory.

# One row per field stays compact only if the formatter leaves the rows alone.
# fmt: off
FIELDS: dict[str, Field] = {
    "data.source": Field("",
        'Training data: "digits", "glyphs", "tfds:NAME[/CONFIG]", "hf:ID_OR_PATH", "csv:PATH", or '
        '"folder:PATH" with PATH/split/class/image or PATH/class/image. If files have no splits, '
        "a fifth of them is the test split."),
    "data.data_dir": Field("",
        'Folder of prepared data sets; "" is the default of tensorflow_datasets.',
        may_change=True),
    "data.train_split": Field("train",
        'Split to train on. Slices work with tfds, for example "train[:90%]".'),
    "data.eval_splits": Field(("test",),
        "Splits evaluated once, at the end, with the selected weights."),
    "data.holdout": Field(0.1,
        'Share of the training split held out (stratified, seeded) as the split "holdout", if '
        "eval.select_split or data.eval_splits name it. 0: no such split.",
        at_least=0, below=1),
    "data.fold": Field("",
        '"2/5" holds out the second of five folds and replaces data.holdout. Runs with the same '
        "train.seed and 1/5 to 5/5 hold out every image of the training split once."),
    "data.division": Field("",
        "How images are chosen for a test split of data without splits, for the hold-out, folds "
        'and samples. "hash": by a hash of their ids, so one more file moves at most one other. '
        '"position": by their place in the listing, as versions before this field did. "": as the '
        "workdir's run began, and by hash in a new one.",
        among=("", "hash", "position")),
    "data.per_class": Field(0,
        "Training images per class, sampled with train.seed after the hold-out. 0: all.",
        at_least=0),
    "data.long_tail": Field(0.0,
        "Long tail: training images of the first class per image of the last, with exponential "
        "decay in between, sampled with train.seed after the hold-out. 0: all images.",
        at_least=0),
    "data.sampling": Field("uniform",
        'Order of training images. "uniform": each once per epoch. "balanced": sampled with '
        'replacement, classes equally often. "sqrt": sampled with replacement, classes by the '
        "square root of their numbers of images. An epoch has as many images in each case.",
        among=("uniform", "sqrt", "balanced")),
    "data.on_error": Field("raise",
        'An image that cannot be decoded: "raise" stops the run and names it. "skip" leaves it '
        "out, counts it and lists it in skipped.jsonl, and stops when more than half of a split "
        "is affected.",
        among=("raise", "skip")),
    "data.cache": Field("",
        'Where decoded images are kept, at 3 bytes per pixel. "ram": from their first use. A '
        "folder on a local disk: decoded there before training and shared by all runs that use "
        'it, until you delete PATH/vitcls-cache. "": decode every time. Batches are the same. If '
        "you replace images under the same names and file sizes, delete the cache.",
        may_change=True),
    "data.image_size": Field(tuple,
        "(height, width) that the network sees, in pixels. Unset: the checkpoint's."),
    "data.crop": Field("inception",
        'Random crop for training. "inception": random area and aspect. "resmall": shorter side '
        'to data.resize, then a random window. "none": the evaluation\'s pixels.',
        among=("inception", "resmall", "none")),
    "data.crop_scale": Field((0.05, 1.0),
        "Share of the area that an inception crop covers, (smallest, largest).",
        needs={"data.crop": "inception"}),
    "data.crop_ratio": Field((3 / 4, 4 / 3),
        "Width / height of an inception crop in pixels, (smallest, largest).",
        needs={"data.crop": "inception"}),
    "data.resize": Field(0,
        'Shorter side in pixels before cropping: in evaluation (central crop) and for "resmall". '
        "0: evaluate as the checkpoint's preprocessing says.",
        at_least=0),
    "data.num_threads": Field(8,
        "Threads that read and decode, per process; capped at two per CPU.",
        at_least=1, may_change=True),
    "data.num_workers": Field(0,
        "Worker processes besides the training process. 0: threads only, usually enough.",
        at_least=0, may_change=True),

    "augment.flip": Field(True,
        "Mirror left and right with probability 1/2. Turn off if mirrored classes differ."),
    "augment.vertical_flip": Field(False,
        "Turn upside down with probability 1/2: for images without an up, such as aerial ones."),
    "augment.rotation": Field(0.0,
        "Rotate by up to this many degrees, uniform in both directions; corners become grey.",
        at_least=0, at_most=180),
    "augment.policy": Field("none",
        '"randaugment" (timm\'s rand-m{magnitude}-n{num_ops}-mstd0.5-inc1), "trivialaugment" '
        '(torchvision\'s wide one) or "none". Bilinear; grey outside the image.',
        among=("none", "randaugment", "trivialaugment")),
    "augment.num_ops": Field(2,
        "RandAugment: operations per image, each applied with probability 1/2.",
        at_least=1, needs={"augment.policy": "randaugment"}),
    "augment.magnitude": Field(9.0,
        "RandAugment: strength of the operations.",
        at_least=0, at_most=10, needs={"augment.policy": "randaugment"}),
    "augment.color_jitter": Field(0.0,
        "Change brightness, contrast and saturation, each by a factor from 1 - this to 1 + this.",
        at_least=0, at_most=1),
    "augment.mixup": Field(0.0,
        "Mixup of image pairs and their targets, with shares from Beta(this, this). 0: off. If "
        "augment.cutmix is on too, each pair takes one of the two, with probability 1/2.",
        at_least=0),
    "augment.cutmix": Field(0.0,
        "CutMix of image pairs and their targets, with shares from Beta(this, this). 0: off.",
        at_least=0),
    "augment.erasing": Field(0.0,
        "Random erasing: probability that a box, 2 to 33 % of the image, becomes noise.",
        at_least=0, at_most=1),

    "model.pretrained": Field("",
        'Checkpoint to start from: Hugging Face id with optional @revision, or a folder. "": '
        "random weights of model.arch."),
    "model.allow_pickle": Field(False,
        "Read torch's pickles (pytorch_model.bin) if model.pretrained has nothing else. Needs "
        "torch, whose restricted unpickler keeps them from running code.",
        needs={"model.pretrained": SET}, may_change=True),
    "model.arch": Field("",
        'Architecture for random weights, such as "vit_b16" or "resnet50". Must be "" when '
        "model.pretrained is set."),
    "model.head": Field("new",
        '"new": a zero head for the classes of the data. "keep": the checkpoint\'s head and class '
        "names.",
        among=("new", "keep")),
    "model.dtype": Field("float32",
        "Type of the computation. Parameters are always float32.",
        among=("float32", "bfloat16")),
    "model.batch_norm": Field("train",
        'ResNet: "train" normalises with the statistics of the global batch and updates the '
        'running ones, also below layers that adapt.freeze keeps. "frozen" uses the running ones '
        "unchanged. Scales and biases are parameters in both cases.",
        among=("train", "frozen")),
    "model.remat": Field("none",
        'What each layer keeps for the backward pass; the rest is computed again. "none": keeps '
        'all. "dots": results of products and convolutions. "full": a layer\'s input only. The '
        "result is the same up to rounding. For accelerators: it saves nothing on CPU.",
        among=REMATS, may_change=True),
    "model.attention": Field("xla",
        'ViT: what computes attention. "xla", or "cudnn": flash attention on NVIDIA GPUs, in '
        "bfloat16, which keeps no scores in memory. The result is the same up to rounding.",
        among=("xla", "cudnn")),
    "model.dropout": Field(0.0, "ViT: dropout rate of the token stream.", at_least=0, below=1),
    "model.drop_path": Field(0.0,
        "ViT: stochastic depth, the drop rate of the last block's branches, rising from 0.",
        at_least=0, below=1),
    "model.patch_dropout": Field(0.0,
        "ViT: PatchDropout, the share of patches that a training step leaves out, different for "
        "each image. Time and memory of a step fall with it.",
        at_least=0, below=1),

    "optim.name": Field("adamw",
        "An optimizer of optax or optax.contrib, by the name of its function."),
    "optim.lr": Field(1e-4, "Peak learning rate.", at_least=0),
    "optim.lr_batch_size": Field(0,
        "Batch size that optim.lr and adapt.probe_lr are meant for: they are multiplied by "
        "train.global_batch_size / this. 0: used unchanged.",
        at_least=0),
    "optim.weight_decay": Field(0.0,
        "Decoupled if the optimizer supports it (adamw, lion, ...), otherwise added to the "
        "gradient.",
        at_least=0),
    "optim.decay": Field(r".*/kernel",
        "Regular expression for the names of the parameters that optim.weight_decay applies to.",
        is_pattern=True, needs={"optim.weight_decay": SET}),
    "optim.clip_norm": Field(1.0,
        "Global norm that gradients are clipped to. 0: no clipping.", at_least=0),
    "optim.schedule": Field("cosine",
        'After the warm-up: "cosine" or "linear" to 0, "constant", or "step", divided by 10 at '
        "30, 60 and 90 % of all steps.",
        among=("cosine", "linear", "constant", "step")),
    "optim.warmup_steps": Field(0,
        "Steps of linear warm-up from 0. Unset: a tenth of the steps, at most 500; with fewer than "
        "20 000 training images a fifth, at most 100. A continued run keeps its own.",
        at_least=0),
    "optim.restarts": Field((),
        "Steps at which the schedule ends and starts again with its warm-up: (1000,) for a run "
        "that was planned for 1000 steps, when it is first continued to 2000. Without it a longer "
        "run jumps to the rate of a run that was planned for the new length."),
    "optim.ema_decay": Field(0.0,
        "EMA decay. If positive, the averaged weights are evaluated. 0: no average.",
        at_least=0, below=1),
    "optim.args": Field({},
        "Further arguments of the optax optimizer, for example momentum = 0.9 for sgd."),

    "loss.name": Field("cross_entropy",
        '"cross_entropy"; "focal", which gives less weight to images that are already right; or '
        '"sigmoid", one binary cross-entropy per class, summed. Evaluation reports plain '
        "cross-entropy.",
        among=("cross_entropy", "focal", "sigmoid")),
    "loss.gamma": Field(2.0, "Focal loss: power of (1 - probability). 0 is cross-entropy.",
        at_least=0, needs={"loss.name": "focal"}),
    "loss.class_weights": Field("none",
        'Weights of images by class. "none". "balanced": 1 / images of the class. "effective": '
        "levels off for frequent classes. Or a weight for every class name, as a JSON object or "
        "the path of a file with one. Batches are divided by the sum of their weights."),
    "loss.beta": Field(0.9999,
        '"effective" class weights: 0 weights classes equally; towards 1 it becomes "balanced".',
        at_least=0, below=1, needs={"loss.class_weights": "effective"}),
    "loss.logit_adjustment": Field(0.0,
        "Adds this times the log of a class' share of the training images to its logit, in "
        "training only, so that rare classes are predicted more often. 1 is balanced softmax. "
        "0: off.",
        at_least=0),
    "loss.label_smoothing": Field(0.0, "Share of the target spread evenly over all classes.",
        at_least=0, below=1),
    "loss.teacher": Field("",
        "Distillation: checkpoint to learn from (workdir, folder or hub id) with the classes of "
        'the data, by name. It sees the same augmented and mixed images. "": no distillation.'),
    "loss.teacher_weight": Field(0.5,
        "Share of the loss against the teacher; the rest is the loss against the labels.",
        at_least=0, at_most=1, needs={"loss.teacher": SET}),
    "loss.temperature": Field(1.0, "Distillation: divisor of the logits of both networks.",
        at_least=1e-3, needs={"loss.teacher": SET}),

    "adapt.train": Field("",
        'What is trained, along with the head: "all"; "head" alone, a linear probe; "attention" or '
        '"bias"; or a regular expression for parameter names. "": all, or the head if '
        "adapt.lora_rank is set. The log lists the names and what is trained.",
        is_pattern=True),
    "adapt.freeze": Field("",
        "Regular expression for the names of the parameters that are not trained, even if "
        'adapt.train matches them. "": none.',
        is_pattern=True),
    "adapt.lr_scale": Field((),
        "Factors of the learning rate by regular expression for names; all that match apply: "
        '((r"embeddings/.*", 0.1), (r"classifier/.*", 10.0)), for example.'),
    "adapt.layer_decay": Field(1.0,
        "Factor of the learning rate from a layer (ResNet: a stage) to the one below. 1: none.",
        at_least=0, at_most=1),
    "adapt.probe_steps": Field(0,
        "Steps of train.total_steps in which only the head is trained. The other steps then start "
        "the optimizer and its schedule anew.",
        at_least=0),
    "adapt.probe_lr": Field(float,
        "Constant learning rate of the probe steps. Unset: optim.lr.",
        at_least=0, needs={"adapt.probe_steps": SET}),
    "adapt.lora_rank": Field(0,
        "LoRA: train products of this rank, added to kernels, instead of the kernels. 0: off.",
        at_least=0),
    "adapt.lora_alpha": Field(float,
        "LoRA: the products are multiplied by this / adapt.lora_rank. Unset: by 1.",
        at_least=0, needs={"adapt.lora_rank": SET}),
    "adapt.lora_targets": Field(r".*/attention/.*/kernel",
        "LoRA: regular expression for the names of the kernels that get a product.",
        is_pattern=True, needs={"adapt.lora_rank": SET}),
    "adapt.l2_sp": Field(0.0,
        "L2-SP: rate that pulls parameters towards their pretrained values, added to the gradient. "
        "0: off, for the head as well.",
        at_least=0),
    "adapt.l2_sp_head": Field(0.01, "L2-SP: rate that pulls a new head towards 0.",
        at_least=0, needs={"adapt.l2_sp": SET, "model.head": "new"}),

    "train.total_steps": Field(0,
        "Length of training in steps. Exactly one of this and train.total_epochs is positive. It "
        "may grow when a run is continued.",
        at_least=0),
    "train.total_epochs": Field(0.0,
        "Length of training in epochs. It may grow when a run is continued.",
        at_least=0),
    "train.global_batch_size": Field(128, "Images per step over all devices.", at_least=1),
    "train.micro_batch": Field(int,
        "Maximum of images per device and pass. A step takes its batch in equal passes, in the "
        "memory of one, and sums their gradients. The result is the same up to rounding, except "
        "with a trained BatchNorm, which normalises each pass by itself. Unset: one pass. 0: the "
        "largest passes that fit into the devices' memory, except with a trained BatchNorm; a "
        "continued run keeps what was chosen.",
        at_least=0, may_change=True),
    "train.seed": Field(0,
        "Seed of everything random: hold-out, order, crops, augmentation, dropout, new weights.",
        at_least=0, below=2**32),
    "train.max_nonfinite": Field(5,
        "Consecutive steps with a loss or gradient that is not finite after which the run stops "
        "with exit code 87. Such steps change nothing, are counted, and are listed with their "
        "images in nonfinite.jsonl.",
        at_least=1, may_change=True),
    "train.deterministic": Field(False,
        "GPU: use only operations that give the same bits every time, as XLA's flag "
        "--xla_gpu_deterministic_ops does. Without it a run that was stopped and continued differs "
        "in the last digits. It costs speed, depending on network and GPU: compare "
        "train/images_per_second. Elsewhere it changes nothing: bits are the same anyway.",
        may_change=True),

    "eval.every_steps": Field(0,
        "Steps between evaluations of eval.select_split, each with a checkpoint. 0: only at the "
        "end. Unset: a tenth of the steps, at least 50. A continued run keeps its own.",
        at_least=0, needs={"eval.select_split": SET}),
    "eval.select_split": Field("holdout",
        'Split that chooses the best checkpoint: "holdout", or a split of the source that is not '
        'in data.eval_splits. "": no choice, the last step is final.'),
    "eval.select_metric": Field("accuracy", "Metric that chooses the best checkpoint.",
        among=SELECT_METRICS, needs={"eval.select_split": SET}),
    "eval.patience": Field(0,
        "Evaluations of eval.select_split in a row without a better score after which training "
        "ends early. 0: no limit. The learning rate still follows train.total_steps.",
        at_least=0, needs={"eval.select_split": SET}),
    "eval.target_precision": Field(0.0,
        "Share of right answers that vitcls.predict --reject promises. 0: no decision.json.",
        at_least=0, below=1, needs={"eval.select_split": SET}, may_change=True),
    "eval.target_coverage": Field(0.0, "Instead, share of images that --reject answers.", below=1,
        at_least=0, may_change=True, needs={"eval.select_split": SET, "eval.target_precision": 0}),
    "eval.batch_size": Field(0,
        "Images per evaluation step over all devices. 0: train.global_batch_size.",
        at_least=0, may_change=True),
    "eval.tta": Field("none",
        '"flip": average the logits of each image and its mirror image, at twice the cost.',
        among=("none", "flip")),

    "checkpoint.every_steps": Field(0,
        "Steps between checkpoints, besides those at evaluations and at the end. 0: only those.",
        at_least=0, may_change=True),
    "checkpoint.keep": Field(2,
        "Number of newest checkpoints to keep. With two, one is left if the other is damaged. The "
        "best one is kept as well.",
        at_least=1, may_change=True),

    "mesh.data": Field(-1, "Devices along the data axis. -1: all that mesh.fsdp leaves.",
        may_change=True),
    "mesh.fsdp": Field(1,
        "Devices over which each large parameter is split (fully sharded data parallel).",
        at_least=1, may_change=True),

    "stall.compile_secs": Field(3600.0,
        "Seconds without progress after which a process counts as stuck and is ended, with the "
        "place of each thread; 0: never. This one: first step of training or evaluation, with its "
        "compilation.",
        at_least=0, at_most=math.inf, may_change=True),
    "stall.step_secs": Field(900.0, "The same for a step of training and the wait for its batch.",
        at_least=0, at_most=math.inf, may_change=True),
    "stall.eval_secs": Field(900.0, "The same for a step of an evaluation, and for its summary.",
        at_least=0, at_most=math.inf, may_change=True),
    "stall.save_secs": Field(3600.0, "The same for writing a checkpoint.",
        at_least=0, at_most=math.inf, may_change=True),

    "log.every_steps": Field(10, "Steps between lines of metrics.", at_least=1, may_change=True),
    "log.wandb_project": Field("",
        "Project of Weights & Biases that also shows the metrics, as one run however often it is "
        'started again. "": none. Its own variables set the rest: WANDB_ENTITY, '
        "WANDB_MODE=offline.",
        may_change=True),
}
# fmt: on

# Fields that may differ when a workdir is continued: they do not change what is computed. Fields
# that may only grow are in `check_same_run`.
RUN_FIELDS = tuple(name for name, field in FIELDS.items() if field.may_change)


def default_config() -> ConfigDict:
    """Returns every field with its default; recipes fill in what they need."""
    config = ConfigDict()
    for name, field in FIELDS.items():
        group, key = name.split(".")
        if group not in config:
            config[group] = ConfigDict()
        value = field.default
        if isinstance(value, type):
            value = placeholder(value)
        config[group][key] = ConfigDict(value) if isinstance(value, dict) else value
    return config
