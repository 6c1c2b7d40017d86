"""What a run is made from: heads, sizes and derived fields."""

import contextlib
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections.config_dict import placeholder
from safetensors.torch import load_file

from vitcls import pretrained, train
from vitcls.checkpoints.manager import Checkpoints
from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.models import vit_config
from vitcls.pretrained.files import formats
from vitcls.provenance import continuing
from vitcls.provenance.saved_config import check_same_run, read_saved_config
from vitcls.run import network, splits, warnings
from vitcls.run.program import with_fields
from vitcls.run.resolve import resolve

DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory):
    """Returns a function that writes a checkpoint with the given class names."""

    def make(class_names: tuple[str, ...]) -> str:
        config = vit_config.vit_config("vit_mu4", num_classes=len(class_names), image_size=(8, 8))
        model = pretrained.make_model(config)
        variables = jax.jit(functools.partial(model.init, train=False))(
            jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )
        processor = pretrained.Processor(size=(8, 8), id2label=dict(enumerate(class_names)))
        directory = tmp_path_factory.mktemp("checkpoint") / "model"
        pretrained.save(directory, model, variables, processor)
        return str(directory)

    return make


def make_config(checkpoint: str, **model):
    config = default_config()
    config.data.source = "digits"
    config.model.pretrained = checkpoint
    config.model.update(model)
    config.train.total_steps = 2
    config.train.global_batch_size = 16
    return config


def test_pickles_are_read_when_allowed(make_checkpoint):
    folder = Path(make_checkpoint(("cat", "dog")))
    torch.save(load_file(folder / formats.SINGLE), folder / "pytorch_model.bin")
    (folder / formats.SINGLE).unlink()
    with pytest.raises(UserError, match="as a pickle only"):
        network.open_model(make_config(str(folder)), DIGITS)
    files, _, _ = network.open_model(make_config(str(folder), allow_pickle=True), DIGITS)
    assert "pytorch_model.bin" in files.sha256()


def test_new_head_takes_the_classes_of_the_data(make_checkpoint):
    config = make_config(make_checkpoint(("cat", "dog")))
    files, model_config, processor = network.open_model(config, DIGITS)
    assert model_config.num_classes == 10
    assert processor.class_names == DIGITS
    params = pretrained.read_variables(files, model_config, new_head=True)["params"]
    assert not params["classifier"]["kernel"].any()


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": {"0": "cat", "7": "dog"}},
        {"id2label": None, "num_labels": 1000},
        {"id2label": 3},
    ],
)
def test_a_head_that_is_not_kept_need_not_fit(make_checkpoint, fields):
    folder = Path(make_checkpoint(("cat", "dog")))
    content = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(content))
    files, model_config, processor = network.open_model(make_config(str(folder)), DIGITS)
    assert processor.class_names == DIGITS
    params = pretrained.read_variables(files, model_config, new_head=True)["params"]
    assert params["classifier"]["kernel"].shape == (32, 10)
    with pytest.raises(UserError):
        network.open_model(make_config(str(folder), head="keep"), DIGITS)


def test_a_kept_head_may_have_numbers_for_names(make_checkpoint):
    folder = Path(make_checkpoint(DIGITS))
    content = json.loads((folder / "config.json").read_text())
    content["id2label"] = {str(number): number - 1 for number in range(1, 11)}
    (folder / "config.json").write_text(json.dumps(content))
    _, _, processor = network.open_model(make_config(str(folder), head="keep"), DIGITS)
    assert processor.class_names == DIGITS


def test_kept_head_keeps_its_class_names(make_checkpoint, caplog):
    names = tuple(f"digit {digit}" for digit in range(10))
    config = make_config(make_checkpoint(names), head="keep")
    _, model_config, processor = network.open_model(config, DIGITS)
    assert model_config.num_classes == 10
    assert processor.class_names == names


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (("cat", "dog"), "keeps 2 classes, but the data has 10; use model.head='new'"),
        (DIGITS[::-1], "has the data's classes in another order"),
    ],
)
def test_kept_head_that_does_not_fit_is_refused(make_checkpoint, class_names, message):
    config = make_config(make_checkpoint(class_names), head="keep")
    with pytest.raises(UserError, match=message):
        network.open_model(config, DIGITS)


@pytest.mark.parametrize("arch", ["vit_mu4", "resnet18", "resnet_mu"])
def test_architectures_of_every_family_are_known(arch):
    config = make_config("", arch=arch)
    config.data.image_size = (32, 48)
    files, model_config, processor = network.open_model(config, DIGITS)
    assert files is None
    assert model_config.num_classes == 10
    assert model_config.image_size == processor.size == (32, 48)


def test_unknown_architectures_list_every_family():
    config = make_config("", arch="resnt50")
    config.data.image_size = (32, 32)
    with pytest.raises(UserError, match="Did you mean 'resnet50'.*resnet18.*vit_b16"):
        network.open_model(config, DIGITS)


def test_image_size_comes_from_the_config_or_the_checkpoint(make_checkpoint):
    config = make_config(make_checkpoint(DIGITS))
    assert network.open_model(config, DIGITS)[1].image_size == (8, 8)
    config.data.image_size = (12, 16)
    _, model_config, processor = network.open_model(config, DIGITS)
    assert model_config.image_size == processor.size == (12, 16)
    config.data.image_size = (10, 10)
    with pytest.raises(UserError, match="not divisible by the patch"):
        network.open_model(config, DIGITS)


def test_black_borders_are_announced(make_checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(splits.log, "propagate", True)
    folder = Path(make_checkpoint(DIGITS))
    content = {"image_processor_type": "CLIPImageProcessor", "size": 9, "crop_size": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    config = make_config(str(folder))
    for size, resize, is_padded in [((8, 8), 0, 0), ((8, 16), 16, 0), ((8, 16), 0, 1)]:
        caplog.clear()
        config.data.update(image_size=size, resize=resize)
        processor = network.open_model(config, DIGITS)[2]
        corner = processor.pixels(np.full((20, 20, 3), 255, np.uint8))[0, 0]
        assert corner.tolist() == [0 if is_padded else 255] * 3
        assert ("black borders; data.resize=16 would cut" in caplog.text) == bool(is_padded)


def test_resize_smaller_than_the_image_is_refused(make_checkpoint):
    config = make_config(make_checkpoint(DIGITS))
    config.data.resize = 7
    with pytest.raises(UserError, match="data.resize=7 is smaller than the image size"):
        network.open_model(config, DIGITS)


def test_a_workdir_is_no_checkpoint_to_start_from(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match="is the workdir of a run. Write its weights to a folder"):
        network.open_model(make_config(str(tmp_path)), DIGITS)


def test_nothing_is_held_out_for_nobody(digits_dir):
    config = make_config("x")
    config.data.data_dir = digits_dir
    assert len(splits.open_splits(config)[0]) == 1437 - 144
    config.eval.select_split = ""
    train_split, evaluated = splits.open_splits(config)
    assert len(train_split) == 1437
    assert set(evaluated) == {"test"}


def test_fold_and_long_tail_make_the_splits_of_a_run(digits_dir):
    config = make_config("x")
    config.data.update(data_dir=digits_dir, fold="2/5", long_tail=10.0)
    train_split, evaluated = splits.open_splits(config)
    assert len(evaluated["holdout"]) in (1437 // 5, 1437 // 5 + 1)
    assert len(evaluated["test"]) == 360
    counts = np.bincount(train_split.labels())
    assert counts[0] // counts[9] == 10
    assert (np.diff(counts) < 0).all()
    held = {evaluated["holdout"].id(i) for i in range(len(evaluated["holdout"]))}
    assert not held & {train_split.id(i) for i in range(len(train_split))}


@pytest.mark.parametrize("fields", [{"fold": "1/5", "long_tail": 10.0}, {"per_class": 9}], ids=str)
def test_what_is_held_out_and_taken_follows_the_seed(digits_dir, fields):
    config = make_config("x")
    config.data.update(data_dir=digits_dir, **fields)

    def ids(seed):
        config.train.seed = seed
        train_split, evaluated = splits.open_splits(config)
        return [
            {split.id(i) for i in range(len(split))}
            for split in (train_split, evaluated["holdout"])
        ]

    first, again, other = ids(0), ids(0), ids(1)
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert len(one) == len(two) and len(one & two) < 0.7 * len(one)


def test_selection_on_images_of_the_test_split_is_refused(digits_dir):
    config = make_config("x")
    config.data.data_dir = digits_dir
    config.eval.select_split = "test[:50%]"
    with pytest.raises(UserError, match="shares images with 'test' of data.eval_splits"):
        splits.open_splits(config)
    config.data.eval_splits = ("test[50%:]",)
    assert len(splits.open_splits(config)[1]) == 2


@pytest.mark.parametrize(
    ("train_split", "select", "evaluated", "message"),
    [
        (
            "train",
            "train[90%:]",
            "test",
            "'train[90%:]' of eval.select_split shares 144 of its 144 ",
        ),
        ("train", "", "train[:10]", "'train[:10]' of data.eval_splits shares 10 of its 10 images"),
        ("train+test", "", "test", "'test' of data.eval_splits shares 360 of its 360 images"),
        ("train[:50%]", "train[40%:60%]", "test", "shares 143 of its 287 images with data.train_"),
    ],
)
def test_images_that_are_trained_on_are_refused_elsewhere(
    digits_dir, caplog, monkeypatch, train_split, select, evaluated, message
):
    monkeypatch.setattr(splits.log, "propagate", True)
    config = make_config("x")
    config.data.update(data_dir=digits_dir, train_split=train_split, eval_splits=(evaluated,))
    config.eval.select_split = select
    with pytest.raises(UserError, match=re.escape(message)):
        splits.open_splits(config)
    splits.open_splits(config, is_continued=True)
    assert message in caplog.text and "The run began so, and continues." in caplog.text


def test_splits_of_other_images_are_accepted(digits_dir):
    config = make_config("x")
    config.data.update(data_dir=digits_dir, train_split="train[:90%]")
    config.eval.select_split = "train[90%:]"
    train_split, evaluated = splits.open_splits(config)
    assert (len(train_split), len(evaluated["train[90%:]"])) == (1293, 144)


def test_a_class_without_training_images_is_refused(tmp_path):
    lines = ["image,label,split"]
    for label in ("ant", "bee", "cat"):
        for number in range(4):
            (tmp_path / f"{label}{number}.png").write_bytes(b"never read")
            split = "test" if label == "cat" or number == 3 else "train"
            lines.append(f"{label}{number}.png,{label},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    config = make_config("x")
    config.data.source, config.eval.select_split = f"csv:{tmp_path}/list.csv", ""
    message = "train: 1 of 3 classes have no images to train on: cat. Add images"
    with pytest.raises(UserError, match=message):
        splits.open_splits(config)


def test_resize_of_the_config_wins_over_the_checkpoint(make_checkpoint):
    config = make_config(make_checkpoint(DIGITS))
    config.data.resize = 10
    assert network.open_model(config, DIGITS)[2].resize == 10


def test_resolve_fills_in_what_follows():
    config = make_config("x")
    config.train.update(total_steps=0, total_epochs=2.5)
    resolved = resolve(config, num_train=100, image_size=(8, 8), num_devices=8)
    assert resolved.train.total_steps == 16  # ceil(250 / 16)
    assert resolved.data.image_size == (8, 8)
    assert resolved.eval.batch_size == 16
    assert config.train.total_steps == 0
    config.optim.warmup_steps = 17
    with pytest.raises(UserError, match="more than the 16 steps"):
        resolve(config, num_train=100, image_size=(8, 8), num_devices=8)


def save_config(config, workdir):
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))


def test_what_was_left_open_is_kept_by_a_run_that_is_continued(tmp_path):
    """Also by one of a version that wrote numbers only."""
    config = make_config("x")
    config.train.total_steps = 1000
    config.optim.warmup_steps = config.eval.every_steps = placeholder(int)
    resolved_of = functools.partial(resolve, num_train=100, image_size=(8, 8), num_devices=8)
    old = resolved_of(config)
    assert (old.optim.warmup_steps, old.eval.every_steps) == (100, 100)
    old.optim.warmup_steps, old.eval.every_steps = 77, 33
    del old.optim.restarts
    save_config(old, tmp_path)
    config.train.total_steps = 2000
    resolved = resolved_of(config, saved=read_saved_config(tmp_path / "config.json"))
    assert (resolved.optim.warmup_steps, resolved.eval.every_steps) == (77, 33)
    check_same_run(resolved, tmp_path / "config.json")
    # As a sweep asks, which leaves them open.
    config.data.image_size, config.eval.batch_size = (8, 8), 16
    check_same_run(config, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        ({"train.total_steps": 2000, "optim.schedule": "constant"}, None),
        (
            {"train.total_steps": 2000},
            "train.total_steps=2000 lengthens a run of 1000 steps: the learning rate goes from "
            "1.8e-07 in step 990 to 0.00027 in the next. optim.schedule='cosine' is laid out anew "
            "over all steps. Given in the first longer start, --config.optim.restarts='(1000,)' "
            "begins it anew after step 1000 instead, with its warm-up.",
        ),
        (
            {"train.total_steps": 2000, "optim.restarts": (1000,)},
            "from 1.8e-07 in step 990 to 1.5e-07 in the next. optim.restarts=(1000,) begins optim.",
        ),
    ],
)
def test_a_run_that_is_lengthened_says_what_its_rate_does(fields, message, tmp_path):
    config = make_config("x")
    config.train.total_steps = 1000
    config.optim.update(lr=5e-4, warmup_steps=100)
    save_config(config, tmp_path)
    config = with_fields(config, fields)
    found = continuing.rate_changes(config, tmp_path / "config.json", step=990)
    assert len(found) == (message is not None) and (message or "") in "".join(found)


def test_a_run_that_began_with_another_step_schedule_says_so(tmp_path):
    config = make_config("x")
    config.train.total_steps = 1000
    config.optim.update(schedule="step", warmup_steps=100)
    save_config(config, tmp_path)
    assert not continuing.rate_changes(config, tmp_path / "config.json", step=320)
    old = config.copy_and_resolve_references()
    del old.optim.restarts
    save_config(old, tmp_path)
    (warning,) = continuing.rate_changes(config, tmp_path / "config.json", step=320)
    assert "this run began when it did so at those of what follows the warm-up" in warning
    assert warning.endswith("It continues with a learning rate of 1e-05.")


def test_rates_are_scaled_with_the_batch():
    config = make_config("x")
    config.optim.update(lr=0.2, lr_batch_size=64)
    config.adapt.probe_lr = 0.4
    resolved = resolve(config, num_train=100, image_size=(8, 8), num_devices=8)
    assert config.train.global_batch_size == 16
    assert (resolved.optim.lr, resolved.adapt.probe_lr) == (0.05, 0.1)
    again = resolve(resolved, num_train=100, image_size=(8, 8), num_devices=8)
    assert again.optim.lr == 0.05


@pytest.mark.parametrize(
    ("field", "value", "num_select", "message"),
    [
        ("optim.lr", 5e-4, 0, "optim.lr=0.0005 is high for adamw on all of a pretrained ViT"),
        ("train.seed", 1, 36, "has 36 images: an accuracy of 90 % has a standard error of 5.0 po"),
        (
            "loss.logit_adjustment",
            1.0,
            0,
            "loss.class_weights and loss.logit_adjustment each correct for rare classes: together",
        ),
        ("data.sampling", "sqrt", 0, "loss.class_weights and data.sampling each correct for rare"),
        ("optim.weight_decay", 0.1, 0, "pulls the same weights to 0. Set optim.weight_decay=0."),
        (
            "train.total_steps",
            1000,
            0,
            "No checkpoint is saved before the end of the 1000 steps, unless a",
        ),
        (
            "optim.warmup_steps",
            2,
            0,
            "optim.warmup_steps=2 is most of the 2 steps of optim.schedule='cosine', which hardly",
        ),
    ],
)
def test_known_traps_are_warned_of(field, value, num_select, message):
    model_config = vit_config.vit_config("vit_ti16", num_classes=2, image_size=(32, 32))
    config = make_config("x")
    config.optim.lr = 1e-4
    config.loss.class_weights = "balanced"
    config.adapt.l2_sp = 0.1
    assert warnings.traps(config, model_config, num_select=100) == []
    group, name = field.split(".")
    config[group][name] = value
    (warning,) = warnings.traps(config, model_config, num_select=num_select)
    assert message in warning
    if field == "optim.lr":
        for adaptation in ({"train": "head"}, {"layer_decay": 0.7}, {"lora_rank": 4}):
            spared = config.copy_and_resolve_references()
            spared.adapt.update(adaptation)
            assert warnings.traps(spared, model_config, num_select=0) == []


def test_evaluation_batch_is_rounded_up_to_the_devices():
    config = make_config("x")
    config.eval.batch_size = 100
    resolved = resolve(config, num_train=100, image_size=(8, 8), num_devices=8)
    assert resolved.eval.batch_size == 104


def test_fine_tuning_starts_from_the_checkpoint(make_checkpoint, digits_dir, tmp_path):
    """The backbone of a frozen run is the checkpoint's, and the first loss is ln K."""
    config = make_config(make_checkpoint(("cat", "dog")))
    config.data.data_dir = digits_dir
    config.adapt.freeze = "(embeddings|encoder|layernorm)/.*"
    config.log.every_steps = 1
    train.train_and_evaluate(config, tmp_path)
    first_line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert f'"train/loss": {np.log(10):.4f}'[:-1] in first_line
    _, variables, processor = pretrained.load(tmp_path)
    expected = pretrained.load(config.model.pretrained)[1]["params"]
    for name in ("embeddings", "encoder", "layernorm"):
        jax.tree.map(np.testing.assert_array_equal, variables["params"][name], expected[name])
    assert processor.class_names == DIGITS
    assert variables["params"]["classifier"]["kernel"].any()


@pytest.mark.slow
def test_l2_sp_keeps_the_weights_it_began_with(make_checkpoint, digits_dir, tmp_path):
    config = make_config(make_checkpoint(("cat", "dog")))
    config.data.data_dir = digits_dir
    config.adapt.l2_sp = 0.1
    config.eval.batch_size = 512
    train.train_and_evaluate(config, tmp_path)
    start = pretrained.load(config.model.pretrained)[1]["params"]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        after = checkpoints._manager.restore(2)
    kept = after["opt_state"][1]  # after clipping
    assert not kept.pop("classifier")["kernel"].any()  # the new head's, of other classes
    del start["classifier"]
    jax.tree.map(np.testing.assert_array_equal, kept, start)
    moved = after["params"]["params"]["encoder"]["layer_0"]["mlp"]["output"]["kernel"]
    assert not np.array_equal(moved, start["encoder"]["layer_0"]["mlp"]["output"]["kernel"])


@pytest.mark.parametrize(
    ("batch_norm", "batch_stats", "is_refused"),
    [("train", {"mean": 0}, True), ("frozen", {"mean": 0}, False), ("train", {}, False)],
)
def test_a_trained_batch_norm_keeps_its_passes(batch_norm, batch_stats, is_refused):
    config = default_config()
    config.model.batch_norm = batch_norm
    shapes = SimpleNamespace(batch_stats=batch_stats)
    program = SimpleNamespace(num_passes=2, state_shapes=shapes, config=config)
    continuing.check_same_passes(2, program)
    message = "began with 4 passes per step and would continue with 2"
    with pytest.raises(UserError, match=message) if is_refused else contextlib.nullcontext():
        continuing.check_same_passes(4, program)
