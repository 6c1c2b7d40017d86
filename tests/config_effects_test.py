"""No field is accepted without effect: each is changed by itself, and what would run is compared.

What would run is the compiled steps, the images and what is done to them, and when it is evaluated.
"""

import hashlib

import jax
import pytest
from ml_collections import ConfigDict

from vitcls.config.checks import check_config
from vitcls.config.fields import RUN_FIELDS, default_config
from vitcls.config.parse import flatten
from vitcls.errors import UserError
from vitcls.run import program, resolve, splits
from vitcls.run.network import open_model, train_transform
from vitcls.step import sharding

# Field -> a value other than the default, which must be refused or change what runs.
CHANGES = {
    "data.train_split": "train[:50%]",
    "data.eval_splits": ("test[:50%]",),
    "data.holdout": 0.3,
    "data.fold": "2/5",
    "data.per_class": 5,
    "data.long_tail": 4.0,
    "data.sampling": "balanced",
    "data.image_size": (12, 12),
    "data.crop": "none",
    "data.crop_scale": (0.5, 1.0),
    "data.crop_ratio": (1.0, 1.0),
    "data.resize": 10,
    "augment.flip": False,
    "augment.vertical_flip": True,
    "augment.rotation": 10.0,
    "augment.policy": "trivialaugment",
    "augment.num_ops": 3,
    "augment.magnitude": 5.0,
    "augment.color_jitter": 0.2,
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "augment.erasing": 0.25,
    "model.head": "keep",
    "model.dtype": "bfloat16",
    "model.batch_norm": "frozen",
    "model.attention": "cudnn",
    "model.dropout": 0.1,
    "model.patch_dropout": 0.5,
    "optim.name": "sgd",
    "optim.lr": 0.01,
    "optim.lr_batch_size": 64,
    "optim.weight_decay": 0.1,
    "optim.decay": ".*",
    "optim.clip_norm": 0.0,
    "optim.schedule": "step",
    "optim.warmup_steps": 2,
    "optim.restarts": (5,),
    "optim.ema_decay": 0.9,
    "loss.name": "focal",
    "loss.gamma": 1.0,
    "loss.class_weights": "balanced",
    "loss.beta": 0.9,
    "loss.logit_adjustment": 1.0,
    "loss.label_smoothing": 0.1,
    "loss.teacher_weight": 0.25,
    "loss.temperature": 2.0,
    "adapt.train": "bias",
    "adapt.freeze": "encoder/.*",
    "adapt.lr_scale": (("classifier/.*", 10.0),),
    "adapt.layer_decay": 0.7,
    "adapt.probe_steps": 2,
    "adapt.probe_lr": 0.1,
    "adapt.lora_rank": 2,
    "adapt.lora_alpha": 4.0,
    "adapt.lora_targets": ".*/mlp/.*/kernel",
    "adapt.l2_sp": 0.1,
    "adapt.l2_sp_head": 0.1,
    "train.total_steps": 20,
    "train.global_batch_size": 32,
    "train.seed": 1,
    "eval.every_steps": 2,
    "eval.select_split": "test[50%:]",
    "eval.select_metric": "loss",
    "eval.tta": "flip",
}
# What is not changed here, and why.
LEFT = {
    "data.source": "any other is other images",
    "data.on_error": "only images that cannot be read show it",
    "data.division": "only data without splits show it",
    "model.arch": "the bases have several",
    "model.drop_path": "rises from 0, and the bases have one layer",
    "model.pretrained": "needs a checkpoint",
    "loss.teacher": "needs a checkpoint",
    "train.total_epochs": "becomes train.total_steps",
    "eval.patience": "only scores that stop improving show it, see train_test",
}
BASES = {
    "vit": {},
    "resnet": {"model.arch": "resnet_mu", "data.image_size": (32, 32)},
    "nothing evaluated": {"eval.select_split": "", "data.eval_splits": ()},
    "no selection": {"eval.select_split": ""},
    "resmall": {"data.crop": "resmall", "data.resize": 12},
    "head": {"adapt.train": "head"},
    "lora": {"adapt.lora_rank": 2},
    "constant": {"optim.schedule": "constant"},
    "fold": {"data.fold": "1/5"},
    "focal": {"loss.name": "focal", "augment.policy": "randaugment", "adapt.probe_steps": 3},
}


def base_config(base: str, data_dir: str) -> ConfigDict:
    config = default_config()
    config.data.update(source="digits", data_dir=data_dir, image_size=(8, 8))
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=10, global_batch_size=16)
    config.update_from_flattened_dict(BASES[base])
    return config


def what_runs(config: ConfigDict) -> list[str]:
    """Digests of all that a run does, but for what fields of `RUN_FIELDS` say."""
    check_config(config)
    train, evaluated = splits.open_splits(config)
    _, network, processor = open_model(config, train.class_names)
    config = resolve.resolve(config, num_train=len(train), image_size=processor.size, num_devices=1)
    made = program.make_program(
        config, network, processor, sharding.make_mesh(1, 1, devices=jax.devices()[:1]),
        class_names=train.class_names, class_counts=train.class_counts(),
    )  # fmt: skip
    used = [
        made.lower().as_text(),
        str(jax.make_jaxpr(made.init_state)(jax.eval_shape(made.init))),
        str(train_transform(config, processor)).replace(str(id(processor)), ""),
        str([train.id(index) for index in range(len(train))]),
        str((config.data.sampling, config.train.total_steps, config.train.seed)),
        *(str([split.id(i) for i in range(len(split))]) for split in evaluated.values()),
    ]
    if evaluated:
        used += [made.lower_eval(config.eval.batch_size).as_text(), repr(processor)]
    if config.eval.select_split:
        used += [config.eval.select_split, str(config.eval.every_steps), config.eval.select_metric]
    return [hashlib.sha256(text.encode()).hexdigest() for text in used]


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_each_field_changes_what_runs_or_is_refused(base, digits_dir, monkeypatch):
    monkeypatch.setattr(splits.log, "disabled", True)
    before = what_runs(base_config(base, digits_dir))
    assert what_runs(base_config(base, digits_dir)) == before
    without_effect = []
    for field, value in CHANGES.items():
        config = base_config(base, digits_dir)
        if flatten(config)[field] == value or field in BASES[base]:
            continue
        config.update_from_flattened_dict({field: value})
        try:
            if what_runs(config) == before:
                without_effect.append(field)
        except UserError:
            pass
    assert without_effect == []


def test_every_field_is_changed_or_left_for_a_reason():
    fields = {*flatten(default_config()), *RUN_FIELDS}
    assert {*CHANGES, *LEFT, *RUN_FIELDS} == fields
    assert not set(CHANGES) & {*LEFT, *RUN_FIELDS}
