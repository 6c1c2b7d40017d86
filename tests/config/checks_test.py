"""Every mistake in a config gets its own message."""

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tests.config.configs import valid_config, with_field
from vitcls.config.checks import check_config, drop_unused
from vitcls.config.fields import default_config
from vitcls.config.parse import flatten
from vitcls.errors import UserError


def test_valid_config_passes_as_it_is():
    config = valid_config()
    check_config(config)
    assert config.to_dict() == valid_config().to_dict()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.lrr", 1.0, "Unknown field of config.optim 'lrr'. Did you mean 'lr'?"),
        ("data.crop", "inceptoin", "Did you mean 'inception'?"),
        ("data.on_error", "ignore", "Unknown value of data.on_error 'ignore'"),
        (
            "data.holdout",
            1.0,
            "data.holdout=1.0 is out of range: it must be at least 0 and below 1",
        ),
        ("data.per_class", -1, "data.per_class=-1 is out of range"),
        ("data.fold", "0/5", "data.fold='0/5' must be NUMBER/FOLDS: '1/5', '2/5', ... '5/5'."),
        ("data.fold", "two of five", "data.fold='two of five' must be NUMBER/FOLDS"),
        ("data.fold", "1/1", "data.fold='1/1' holds everything out; use two folds or more."),
        ("data.long_tail", 0.5, "data.long_tail=0.5 must be the largest class by the smallest"),
        ("data.sampling", "balance", "data.sampling 'balance'. Did you mean 'balanced'?"),
        ("data.num_threads", 0, "data.num_threads=0 is out of range: it must be at least 1."),
        ("optim.lr", float("nan"), "optim.lr=nan is out of range"),
        ("optim.decay", "[", "optim.decay='[' is not a regular expression"),
        ("data.image_size", (32,), r"data.image_size=(32,) must be (height, width)"),
        ("data.crop_scale", (0.5, 1.5), "data.crop_scale=(0.5, 1.5) must be"),
        ("data.crop_ratio", (2.0, 1.0), "data.crop_ratio=(2.0, 1.0) must be"),
        ("data.source", "", "data.source is empty"),
        ("data.crop", "resmall", "needs data.resize"),
        ("data.holdout", 0.0, "eval.select_split='holdout' but data.holdout=0"),
        ("data.eval_splits", ("holdout",), "a split that chooses the checkpoint cannot measure it"),
        ("model.pretrained", "some/model", "set exactly one"),
        ("model.arch", "", "set exactly one"),
        ("model.head", "keep", "model.head='keep' needs model.pretrained"),
        ("model.head", "old", "Unknown value of model.head 'old'"),
        ("model.batch_norm", "freeze", "model.batch_norm 'freeze'. Did you mean 'frozen'?"),
        ("data.image_size", None, "data.image_size must be set when model.arch"),
        ("train.total_epochs", 2.0, "exactly one must be positive"),
        ("train.total_steps", 0, "exactly one must be positive"),
        ("optim.warmup_steps", 11, "optim.warmup_steps=11 is more than the 10 steps of training."),
        (
            "optim.restarts",
            (5, 10),
            "optim.restarts=(5, 10) must be rising steps below train.total_",
        ),
        ("optim.restarts", (5, 3), "optim.restarts=(5, 3) must be rising steps below train.total_"),
        ("optim.restarts", (0,), "optim.restarts=(0,) must be steps above 0: (1000,)."),
        ("optim.restarts", (2.5,), "optim.restarts=(2.5,) must be steps above 0: (1000,)."),
        ("eval.select_metric", "acuracy", "Did you mean 'accuracy'?"),
        ("eval.target_precision", 1.0, "eval.target_precision=1.0 is out of range: it must be at "),
        ("eval.target_coverage", -0.1, "eval.target_coverage=-0.1 is out of range"),
        ("eval.tta", "flips", "Did you mean 'flip'?"),
        ("augment.policy", "randaugmnt", "Did you mean 'randaugment'?"),
        (
            "augment.rotation",
            181,
            "augment.rotation=181.0 is out of range: it must be at least 0 and at most 180.",
        ),
        ("augment.magnitude", 11.0, "augment.magnitude=11.0 is out of range"),
        (
            "augment.magnitude",
            5.0,
            "augment.magnitude=5.0 has no effect: it needs augment.policy='randaugment', and that "
            "is 'none'. Set it, or leave augment.magnitude at 9.0.",
        ),
        ("augment.num_ops", 3, "augment.num_ops=3 has no effect: it needs augment.policy="),
        ("optim.decay", ".*", "optim.decay='.*' has no effect: it needs optim.weight_decay, and"),
        ("loss.gamma", 1.0, "loss.gamma=1.0 has no effect: it needs loss.name='focal', and"),
        ("loss.beta", 0.9, "loss.beta=0.9 has no effect: it needs loss.class_weights='effec"),
        ("adapt.probe_lr", 0.1, "adapt.probe_lr=0.1 has no effect: it needs adapt.probe_steps"),
        (
            "adapt.lora_alpha",
            8.0,
            "adapt.lora_alpha=8.0 has no effect: it needs adapt.lora_rank, and that is 0. Set it, "
            "or leave adapt.lora_alpha unset.",
        ),
        ("adapt.lora_targets", "a", "adapt.lora_targets='a' has no effect: it needs adapt.lora_r"),
        ("adapt.l2_sp_head", 0.1, "adapt.l2_sp_head=0.1 has no effect: it needs adapt.l2_sp, and"),
        ("model.patch_dropout", 1.0, "it must be at least 0 and below 1."),
        (
            "loss.temperature",
            2.0,
            "loss.temperature=2.0 has no effect: it needs loss.teacher, and that",
        ),
        ("loss.teacher_weight", 1.5, "it must be at least 0 and at most 1."),
        ("loss.name", "focl", "Unknown value of loss.name 'focl'. Did you mean 'focal'?"),
        *[
            ("loss.class_weights", weights, f"{weights!r} must be none, balanced, effective")
            for weights in (
                "weights.json",
                "/",
                "[1]",
                '{"a": "much"}',
                '{"a": -1}',
                '{"a": 0}',
                "{}",
            )
        ],
        ("adapt.train", "*", "adapt.train='*' is not a regular expression"),
        ("adapt.lr_scale", (("a", 0.0),), "for a factor of 0 use adapt.freeze"),
        ("adapt.lr_scale", ("a", 2.0), "adapt.lr_scale=('a', 2.0) must be pairs"),
        ("adapt.lr_scale", (("[", 2.0),), "adapt.lr_scale='[' is not a regular expression"),
        ("adapt.layer_decay", 0.0, "adapt.layer_decay=0 trains nothing below the head"),
        ("adapt.layer_decay", 1.1, "adapt.layer_decay=1.1 is out of range"),
        ("adapt.probe_steps", 10, "adapt.probe_steps=10 leaves nothing of the 10 steps"),
        ("adapt.l2_sp", 0.1, "adapt.l2_sp=0.1 pulls to the pretrained weights, but"),
    ],
)
def test_each_mistake_has_its_message(field, value, message):
    with pytest.raises(UserError) as error:
        check_config(with_field(field, value))
    assert message in str(error.value)


# Field and value, what of others leaves it without effect, and what the message says of it.
UNUSED = [
    ("data.crop_scale", (0.2, 1.0), {"data.crop": "none"}, "data.crop='inception', and that is 'n"),
    ("data.crop_ratio", (1.0, 1.0), {"data.crop": "resmall", "data.resize": 40}, "data.crop='ince"),
    ("data.holdout", 0.2, {"data.fold": "1/5"}, "data.fold says what is held out"),
    (
        "data.holdout",
        0.2,
        {"eval.select_split": "val"},
        "neither eval.select_split nor data.eval_s",
    ),
    ("data.holdout", 0.2, {"eval.select_split": ""}, "neither eval.select_split nor data.eval_spl"),
    ("data.resize", 40, {"eval.select_split": "", "data.eval_splits": ()}, "it is for evaluation"),
    ("eval.batch_size", 8, {"eval.select_split": "", "data.eval_splits": ()}, "data.eval_splits a"),
    ("eval.tta", "flip", {"eval.select_split": "", "data.eval_splits": ()}, "data.eval_splits and"),
    ("stall.eval_secs", 9.0, {"eval.select_split": "", "data.eval_splits": ()}, "data.eval_splits"),
    (
        "eval.target_coverage",
        0.9,
        {"eval.select_split": ""},
        "it needs eval.select_split, and that",
    ),
    (
        "eval.target_precision",
        0.9,
        {"eval.select_split": ""},
        "it needs eval.select_split, and tha",
    ),
    (
        "eval.target_coverage",
        0.9,
        {"eval.target_precision": 0.95},
        "it needs eval.target_precision=0, and that is 0.95. Set it, or leave eval.target_coverage",
    ),
    (
        "eval.every_steps",
        5,
        {"eval.select_split": ""},
        "it needs eval.select_split, and that is ''",
    ),
    ("eval.select_metric", "loss", {"eval.select_split": ""}, "it needs eval.select_split, and t"),
    ("model.allow_pickle", True, {}, "it needs model.pretrained, and that is ''"),
    (
        "loss.name",
        "sigmoid",
        {"loss.teacher": "x", "loss.teacher_weight": 1.0},
        "leaves nothing of",
    ),
    (
        "loss.label_smoothing",
        0.1,
        {"loss.teacher": "x", "loss.teacher_weight": 1.0},
        "leaves nothing of the loss against the labels. Change that, or leave loss.label_smoothing",
    ),
    ("adapt.layer_decay", 0.7, {"adapt.train": "head"}, "the head, which alone is trained, has"),
    ("optim.restarts", (5,), {"optim.schedule": "constant"}, "has nothing to begin anew"),
]


@pytest.mark.parametrize(("field", "value", "others", "message"), UNUSED)
def test_a_field_without_effect_is_refused_where_it_is_given(field, value, others, message):
    """And goes back to its default where a recipe sets it and an override makes it void."""
    config = valid_config()
    config.update_from_flattened_dict(others)
    check_config(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        check_config(config)
    assert f"{field}={value!r} has no effect: " in str(error.value)
    assert message in str(error.value) and f", or leave {field} " in str(error.value)
    drop_unused(config, given=[field])
    assert flatten(config)[field] == value
    drop_unused(config, given=others)
    assert flatten(config)[field] == flatten(default_config())[field]
    check_config(config)


def test_a_default_or_what_is_off_is_never_without_effect():
    config = valid_config()
    config.eval.select_split = ""
    config.data.update(eval_splits=(), crop="none", fold="", holdout=0.0)
    config.eval.every_steps = placeholder(int)
    check_config(config)
    # A place on this machine, for whichever source needs it.
    config.data.update(holdout=0.1, source="folder:x", data_dir="/data")
    check_config(config)


def test_a_kept_head_has_the_rate_of_what_is_pretrained():
    config = with_field("adapt.l2_sp_head", 0.5)
    config.adapt.l2_sp = 0.1
    config.model.update(pretrained="some/model", arch="")
    check_config(config)
    config.model.head = "keep"
    with pytest.raises(UserError, match="l2_sp_head=0.5 has no effect: it needs model.head='new'"):
        check_config(config)


def test_images_that_are_never_mirrored_are_not_evaluated_mirrored():
    config = with_field("eval.tta", "flip")
    check_config(config)
    config.augment.flip = False
    with pytest.raises(UserError, match="augment.flip=False keeps from training"):
        check_config(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"probe_steps": 3, "train": "head"},
            "adapt.probe_steps=3 with adapt.train='head': nothing else is trained",
        ),
        ({"l2_sp": 0.1, "lora_rank": 4}, "adapt.l2_sp=0.1 with adapt.lora_rank=4: LoRA keeps"),
        (
            {"probe_steps": 3},
            "optim.warmup_steps=8 is more than the 7 steps of training that follow adapt.probe_",
        ),
    ],
)
def test_ways_of_tuning_that_exclude_each_other(fields, message):
    config = valid_config()
    config.adapt.update(fields)
    config.optim.warmup_steps = 8
    config.model.update(pretrained="some/model", arch="")
    with pytest.raises(UserError) as error:
        check_config(config)
    assert message in str(error.value)


def test_every_cycle_has_room_for_its_warm_up():
    config = with_field("optim.restarts", (4, 8))
    config.optim.warmup_steps = 1
    check_config(config)
    config.optim.warmup_steps = 2
    with pytest.raises(UserError, match="each more than optim.warmup_steps=2 after the one before"):
        check_config(config)
    config.optim.warmup_steps = 0
    config.optim.schedule = "constant"
    with pytest.raises(UserError, match=r"optim.restarts=\(4, 8\) has no effect: optim.schedule="):
        check_config(config)


def test_logit_adjustment_of_a_sigmoid_is_refused():
    config = with_field("loss.name", "sigmoid")
    config.loss.logit_adjustment = 1.0
    with pytest.raises(UserError, match="corrects a softmax, and loss.name='sigmoid' has none"):
        check_config(config)


def test_a_teacher_without_weight_is_refused():
    config = valid_config()
    config.loss.update(teacher="runs/a", teacher_weight=0.0)
    with pytest.raises(UserError, match="loss.teacher='runs/a' has no effect: loss.teacher_weight"):
        check_config(config)


def test_worker_processes_share_no_memory():
    config = with_field("data.cache", "ram")
    config.data.num_workers = 2
    with pytest.raises(UserError, match="'ram' with data.num_workers=2 would keep the images once"):
        check_config(config)


def test_a_fold_replaces_the_hold_out_and_is_looked_at():
    config = with_field("data.fold", "2/5")
    config.data.holdout = 0.0
    check_config(config)
    config.eval.select_split = ""
    with pytest.raises(
        UserError, match="data.fold='2/5' holds out images that are never evaluated"
    ):
        check_config(config)
    config.data.eval_splits = ("holdout",)
    check_config(config)


def test_classes_are_of_one_size_or_fall_off():
    config = with_field("data.long_tail", 10.0)
    check_config(config)
    config.data.per_class = 5
    with pytest.raises(UserError, match="data.long_tail=10.0 and data.per_class=5: classes cannot"):
        check_config(config)


def test_unknown_group_suggests_the_nearest():
    config = valid_config()
    config.optm = ConfigDict({"lr": 0.1})
    with pytest.raises(UserError, match="Unknown config group 'optm'. Did you mean 'optim'?"):
        check_config(config)


def test_group_replaced_by_a_value_is_refused():
    config = valid_config()
    with config.ignore_type():
        config.optim = 3
    with pytest.raises(UserError, match="config.optim is a group of fields"):
        check_config(config)
