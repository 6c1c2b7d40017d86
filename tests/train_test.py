"""Whole runs: what they leave, how they stop, continue and end."""

import functools
import json
import logging
import os
import shutil
import signal
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vitcls import pretrained, train
from vitcls.checkpoints.manager import Checkpoints
from vitcls.config.fields import default_config
from vitcls.config.parse import flatten
from vitcls.costs import footprint
from vitcls.data import images
from vitcls.errors import Interrupted, NonFiniteLoss, UserError
from vitcls.evaluate import run_evaluator
from vitcls.evaluate.exact import evaluate_checkpoint
from vitcls.logs.writers import LateMetrics
from vitcls.provenance import continuing
from vitcls.run import splits
from vitcls.step import metrics

NUM_TEST = 360


@pytest.fixture
def config(digits_dir):
    """A short run with everything random switched on."""
    config = default_config()
    config.data.source = "digits"
    config.data.data_dir = digits_dir
    config.data.image_size = (8, 8)
    config.data.num_threads = 2
    config.model.arch = "vit_mu4"
    config.model.dropout = 0.1
    config.model.drop_path = 0.1
    config.optim.lr = 1e-3
    config.optim.ema_decay = 0.9
    config.train.total_steps = 8
    config.train.global_batch_size = 16
    config.eval.every_steps = 4
    config.eval.batch_size = 128
    config.log.every_steps = 2
    return config


def interrupt_at(step: int, monkeypatch) -> None:
    """Sends this process SIGTERM once `step` has been done."""
    add = LateMetrics.add

    def add_and_interrupt(self, number, metrics):
        add(self, number, metrics)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LateMetrics, "add", add_and_interrupt)


def metric_lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_items(workdir, step) -> dict:
    """All arrays of a checkpoint, as numpy."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    restored = checkpoints._manager.restore(step)
    return {name: jax.device_get(restored[name]) for name in ("params", "opt_state", "ema")}


def test_a_run_leaves_what_the_contract_says(config, tmp_path, capsys):
    results = train.train_and_evaluate(config, tmp_path / "run")
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text()) == results
    assert results["step"] == 8 and results["selected_step"] in (4, 8)
    assert set(results["splits"]) == {"test", "holdout"}
    assert results["splits"]["test"]["num_examples"] == NUM_TEST
    assert results["images_per_second"] > 0 and results["seconds"] > 0

    predictions = np.load(run / "predictions/test.npz")
    assert predictions["logits"].shape == (NUM_TEST, 10)
    assert predictions["logits"].dtype == np.float32
    assert len(set(predictions["ids"].tolist())) == NUM_TEST
    accuracy = (predictions["logits"].argmax(-1) == predictions["labels"]).mean()
    assert results["splits"]["test"]["accuracy"] == pytest.approx(accuracy)

    saved = json.loads((run / "config.json").read_text())
    assert saved["data"]["image_size"] == [8, 8] and saved["train"]["total_steps"] == 8
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["data"]["test"]["num_examples"] == NUM_TEST
    assert manifest["devices"]["count"] == 8 and manifest["pretrained"] is None
    assert json.loads((run / "model/config.json").read_text())["model_type"] == "vit"
    assert (run / "model/preprocessor_config.json").exists()
    assert not (run / "model/decision.json").exists()

    lines = metric_lines(run)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "holdout/accuracy" in line] == [4, 8]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [8]
    assert list(run.glob("events.out.tfevents.*"))
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith(f"test accuracy {results['splits']['test']['accuracy']:.4f} (360")


def test_a_run_stopped_and_continued_is_bit_for_bit_the_same(config, tmp_path, monkeypatch):
    config.eval.target_coverage = 0.8
    whole = train.train_and_evaluate(config, tmp_path / "whole")
    for step in (3, 4):  # between evaluations, and at one
        with monkeypatch.context() as patch:
            interrupt_at(step, patch)
            with pytest.raises(Interrupted, match=f"SIGTERM: saved after step {step} of 8"):
                train.train_and_evaluate(config, tmp_path / "parts")
    with monkeypatch.context() as patch:  # in the evaluation of step 4, which had no time before
        add_sums = metrics.add_sums
        kill = functools.partial(os.kill, os.getpid(), signal.SIGUSR1)
        patch.setattr(metrics, "add_sums", lambda *sums: kill() or add_sums(*sums))
        with pytest.raises(Interrupted, match="SIGUSR1: an evaluation stopped"):
            train.train_and_evaluate(config, tmp_path / "parts")
    decisions = [tmp_path / name / "model/decision.json" for name in ("whole", "parts")]
    assert not decisions[1].exists()
    parts = train.train_and_evaluate(config, tmp_path / "parts")
    assert decisions[0].read_bytes() == decisions[1].read_bytes()
    decision = json.loads(decisions[0].read_text())
    assert decision["step"] == whole["selected_step"] and decision["split"] == "holdout"
    assert decision["coverage"]["value"] == pytest.approx(0.8, abs=0.02)
    jax.tree.map(
        np.testing.assert_array_equal,
        final_items(tmp_path / "whole", 8),
        final_items(tmp_path / "parts", 8),
    )
    assert parts["splits"] == whole["splits"]
    assert parts["selected_step"] == whole["selected_step"]

    def losses(name):
        measured = {"time", "train/images_per_second", "train/waiting"}
        return [
            {name: value for name, value in line.items() if name not in measured}
            for line in metric_lines(tmp_path / name)
        ]

    assert losses("parts") == losses("whole")


@pytest.mark.slow
def test_lora_after_a_probe_continues_bit_for_bit_and_is_a_checkpoint(
    config, tmp_path, monkeypatch
):
    """With every other way to tune that may go with it, and without the weights it began from."""
    config.adapt.update(
        lora_rank=2,
        lora_alpha=4.0,
        lora_targets=".*/(attention|mlp)/.*/kernel",
        train=".*layernorm_after/.*",
        probe_steps=2,
        probe_lr=3e-3,
        layer_decay=0.8,
        lr_scale=((".*/lora_b", 4.0),),
    )
    config.loss.update(name="focal", class_weights="effective", logit_adjustment=0.5)
    config.optim.update(name="adan", weight_decay=0.01, schedule="step", lr_batch_size=32)
    whole = train.train_and_evaluate(config, tmp_path / "whole")
    for step in (1, 5):  # during the probe and after it
        with monkeypatch.context() as patch:
            interrupt_at(step, patch)
            with pytest.raises(Interrupted):
                train.train_and_evaluate(config, tmp_path / "parts")
    parts = train.train_and_evaluate(config, tmp_path / "parts")
    items = [final_items(tmp_path / name, 8) for name in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *items)
    assert parts["splits"] == whole["splits"]
    qkv = items[0]["ema"]["params"]["encoder"]["layer_0"]["attention"]["qkv"]
    assert qkv["lora_b"].any()

    model, variables, processor = pretrained.load(tmp_path / "whole@last")
    kernel = variables["params"]["encoder"]["layer_0"]["attention"]["qkv"]["kernel"]
    np.testing.assert_allclose(
        kernel, qkv["kernel"] + 4 / 2 * qkv["lora_a"] @ qkv["lora_b"], atol=1e-7
    )
    pretrained.save(tmp_path / "model", model, variables, processor)
    # What was evaluated in the run is what anybody else gets of it.
    split = splits.open_splits(config)[1]["test"]
    summary, predictions = evaluate_checkpoint(tmp_path / "whole", split)
    kept = np.load(tmp_path / "whole/predictions/test.npz")
    np.testing.assert_allclose(predictions["logits"], kept["logits"], atol=1e-5)
    assert summary["accuracy"] == whole["splits"]["test"]["accuracy"]


def test_a_run_from_decoded_images_is_bit_for_bit_the_same(config, tmp_path, monkeypatch):
    config.train.total_steps = 2
    train.train_and_evaluate(config, tmp_path / "streamed")
    decoded, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda data: decoded.append(data) or decode(data))
    config.data.cache = str(tmp_path)
    train.train_and_evaluate(config, tmp_path / "cached")
    assert len(decoded) == 1437 + NUM_TEST  # before training, each image once
    jax.tree.map(
        np.testing.assert_array_equal,
        final_items(tmp_path / "streamed", 2),
        final_items(tmp_path / "cached", 2),
    )


def test_a_finished_run_says_so_and_can_be_lengthened(config, tmp_path, capsys):
    config.train.total_steps = 2
    first = train.train_and_evaluate(config, tmp_path)
    capsys.readouterr()
    assert train.train_and_evaluate(config, tmp_path) == first
    assert capsys.readouterr().out.startswith("test accuracy")
    config.train.total_steps = 4
    assert train.train_and_evaluate(config, tmp_path)["step"] == 4


def test_a_longer_run_says_what_its_rate_does_and_continues_exactly(
    config, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    config.train.update(total_steps=0, total_epochs=0.05)  # 5 steps of 16 among 1293 images
    config.optim.warmup_steps = 1
    train.train_and_evaluate(config, tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "whole")
    config.train.total_epochs = 0.12
    config.optim.restarts = (5,)
    train.train_and_evaluate(config, tmp_path / "whole")
    assert "train.total_steps=10 lengthens a run of 5 steps: the learning rate goes" in caplog.text
    with monkeypatch.context() as patch:
        interrupt_at(7, patch)
        with pytest.raises(Interrupted, match="SIGTERM: saved after step 7 of 10"):
            train.train_and_evaluate(config, tmp_path / "parts")
    caplog.clear()
    train.train_and_evaluate(config, tmp_path / "parts")
    assert "lengthens" not in caplog.text
    jax.tree.map(
        np.testing.assert_array_equal,
        final_items(tmp_path / "whole", 10),
        final_items(tmp_path / "parts", 10),
    )
    # What was trained with: each cycle begins at 0.
    rates = {line["step"]: line["train/lr"] for line in metric_lines(tmp_path / "parts")
             if "train/lr" in line}  # fmt: skip
    assert rates[6] == 0 < rates[8] and rates[10] < rates[8]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_step_compiles_once_in_a_new_and_in_a_continued_run(
    config, tmp_path, caplog, num_devices
):
    # It compiles while the weights are read: what it is then called with must find the result.
    devices = jax.devices()[:num_devices]
    for total_steps in (2, 3):
        config.train.total_steps = total_steps
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("DEBUG", logger="jax"):
            train.train_and_evaluate(config, tmp_path, devices=devices)
        assert caplog.text.count("Finished tracing train_step") == 1
        assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 1


def test_a_workdir_of_another_config_is_refused(config, tmp_path):
    config.train.total_steps = 2
    train.train_and_evaluate(config, tmp_path)
    config.optim.lr = 0.5
    with pytest.raises(UserError, match="optim.lr: 0.001 there, 0.5 asked for"):
        train.train_and_evaluate(config, tmp_path)


def test_double_precision_of_the_calling_program_is_refused(config, tmp_path):
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64=True"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mistake_does_not_claim_the_workdir(config, tmp_path):
    config.train.total_steps = 1
    config.adapt.freeze = "encoder"
    with pytest.raises(UserError, match="matches no parameter"):
        train.train_and_evaluate(config, tmp_path)
    config.adapt.freeze = "encoder/.*"
    assert train.train_and_evaluate(config, tmp_path)["step"] == 1


def test_a_damaged_checkpoint_does_not_claim_the_workdir(config, tmp_path):
    config.train.total_steps = 1
    train.train_and_evaluate(config, tmp_path / "a")
    pretrained.save(tmp_path / "model", *pretrained.load(tmp_path / "a"))
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config.model.update(arch="", pretrained=str(tmp_path / "model"))
    with pytest.raises(UserError, match="model.safetensors"):
        train.train_and_evaluate(config, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_passes_and_remat_may_change_on_continuing(config, tmp_path, monkeypatch, caplog):
    """A run of two passes and layers computed again, then of neither, is the run of neither."""
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    whole = train.train_and_evaluate(config, tmp_path / "whole")
    config.train.micro_batch = 1
    config.model.remat = "full"
    with monkeypatch.context() as patch, caplog.at_level("INFO", logger="vitcls"):
        interrupt_at(3, patch)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(config, tmp_path / "parts")
    assert "A step takes 2 images on each device, 1 at a time." in caplog.text
    assert "On each device: parameters 0.1 MB, optimizer 0.1 MB, average 0.1 MB." in caplog.text
    assert Checkpoints(tmp_path / "parts/checkpoints", read_only=True).meta(3)["num_passes"] == 2
    config.train.micro_batch = None
    config.model.remat = "none"
    parts = train.train_and_evaluate(config, tmp_path / "parts")
    assert parts["splits"]["test"]["loss"] == pytest.approx(
        whole["splits"]["test"]["loss"], abs=1e-5
    )


def test_passes_chosen_by_memory_are_recorded_and_kept(config, tmp_path, monkeypatch):
    config.train.micro_batch = 0
    with monkeypatch.context() as patch:
        patch.setattr(footprint, "bytes_needed", lambda program: program.pass_size)
        patch.setattr(footprint, "usable_bytes", lambda mesh: 1)
        interrupt_at(3, patch)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["micro_batch"] == 1
    results = train.train_and_evaluate(config, tmp_path)  # with memory for all images at once
    assert json.loads((tmp_path / "config.json").read_text())["train"]["micro_batch"] == 1
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).meta(8)["num_passes"] == 2
    plan = results["plan"]
    assert plan["step_secs"]["measured"] == pytest.approx(16 / results["images_per_second"])
    assert plan["step_secs"]["planned"] is None  # nobody knows what a CPU can do
    assert plan["bytes_per_device"]["planned"] > 3e5 and plan["flops_per_step_and_device"] > 0


def test_a_refused_continuation_leaves_the_workdir_as_it_was(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        with pytest.raises(Interrupted):
            train.train_and_evaluate(config, tmp_path)
    before = (tmp_path / "config.json").read_text()
    config.train.micro_batch = 1
    with monkeypatch.context() as patch:
        patch.setattr(continuing, "check_same_passes", refuse)
        with pytest.raises(UserError, match="another number of passes"):
            train.train_and_evaluate(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def refuse(num_passes, program):
    assert (num_passes, program.num_passes) == (1, 2)
    raise UserError("another number of passes")


def test_a_run_can_be_loaded_at_any_of_its_checkpoints(config, tmp_path):
    results = train.train_and_evaluate(config, tmp_path)
    loaded = {
        which: pretrained.load(f"{tmp_path}{which}")[1]["params"]
        for which in ("", "@best", "@last", "@8")
    }
    for which, step in [("", results["selected_step"]), ("@last", 8), ("@8", 8)]:
        averaged = final_items(tmp_path, step)["ema"]["params"]
        jax.tree.map(np.testing.assert_array_equal, loaded[which], averaged)
    jax.tree.map(np.testing.assert_array_equal, loaded[""], loaded["@best"])
    for which in ("7", "latest"):
        with pytest.raises(UserError, match=f"has no checkpoint '{which}'; it has the steps"):
            pretrained.load(f"{tmp_path}@{which}")


def test_a_diverging_run_stops_and_saves_nothing_of_it(config, tmp_path):
    config.optim.lr = 1e30
    config.optim.name = "sgd"
    config.optim.clip_norm = 0.0
    config.optim.warmup_steps = 1  # of rate 0: the first step is sound
    config.train.max_nonfinite = 3
    config.checkpoint.every_steps = 1
    with pytest.raises(NonFiniteLoss, match="diverged, as did all of the last 3"):
        train.train_and_evaluate(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        latest = checkpoints.latest_step()
        assert checkpoints.meta(latest)["skips"]["in_row"] == 2
    assert not (tmp_path / "results.json").exists()
    items = final_items(tmp_path, latest)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(items["params"]))
    with pytest.raises(NonFiniteLoss, match=f"Step {latest + 1} diverged"):
        train.train_and_evaluate(config, tmp_path)
    # Every step once, with the images that it was to learn.
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [latest - 1, latest, latest + 1]
    assert all(len(set(line["ids"])) == 16 for line in lines)


def test_a_final_evaluation_that_is_not_finite_ends_the_run(config, tmp_path):
    config.optim.update(name="sgd", lr=3e38, clip_norm=0.0, warmup_steps=0, ema_decay=0.0)
    config.eval.update(select_split="", every_steps=0)
    config.train.total_steps = 1
    with pytest.raises(NonFiniteLoss, match=r"to \d+ of 360 images are not finite: digits-test"):
        train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "predictions").exists()


def test_batch_that_the_devices_do_not_divide_is_refused(config, tmp_path):
    config.train.global_batch_size = 20
    with pytest.raises(UserError, match="=20 is not divisible by 8 devices; use 16 or 24."):
        train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("num_steps", [1, 99])
def test_profile_leaves_a_trace(config, tmp_path, num_steps):
    config.train.total_steps = 3
    train.train_and_evaluate(config, tmp_path, num_profiled_steps=num_steps)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_without_better_scores_ends_early_also_after_a_signal(
    config, tmp_path, monkeypatch, caplog
):
    """The second evaluation, after step 4, and the third, after step 6, are not better."""
    config.eval.update(every_steps=2, patience=2)
    monkeypatch.setattr(run_evaluator, "select_score", lambda summary, metric: 0.5)
    # The signal comes in step 5, after one evaluation that was not better.
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(Interrupted, match="SIGTERM: saved after step 5 of 8"):
            train.train_and_evaluate(config, tmp_path)
    results = train.train_and_evaluate(config, tmp_path)
    assert results["step"] == 6 and results["stopped_early"]
    before = (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(train.log, "propagate", True)
    with caplog.at_level("INFO", logger="vitcls"):
        assert train.train_and_evaluate(config, tmp_path) == results
    assert (tmp_path / "metrics.jsonl").read_text() == before
    # More steps would not continue it, and are not advised.
    assert "finished; eval.patience ended it after step 6." in caplog.text


def test_selection_never_looks_at_the_test_split(config, tmp_path, monkeypatch):
    """Until the last step only the hold-out is read."""
    names = []
    evaluate = run_evaluator.evaluate

    def recorded(*args, name, **kwargs):
        names.append(name)
        return evaluate(*args, name=name, **kwargs)

    monkeypatch.setattr(run_evaluator, "evaluate", recorded)
    train.train_and_evaluate(config, tmp_path)
    assert names == ["holdout", "holdout", "test", "holdout"]


def test_every_field_of_the_config_is_read(config, tmp_path, monkeypatch):
    """A field that only its check reads would be an option without effect."""
    train.train_and_evaluate(config, tmp_path / "a")  # what the second run starts from
    params = pretrained.load(tmp_path / "a")
    pretrained.save(tmp_path / "model", *params)
    groups = {frozenset(group.keys()): name for name, group in default_config().items()}
    read, get = set(), ConfigDict.__getitem__

    def get_and_record(self, name):
        callers = {frame.filename.rsplit("/", 1)[-1] for frame in traceback.extract_stack()}
        if "config.py" not in callers and frozenset(self.keys()) in groups:
            read.add(f"{groups[frozenset(self.keys())]}.{name}")
        return get(self, name)

    monkeypatch.setattr(ConfigDict, "__getitem__", get_and_record)
    config.train.total_steps = 1
    train.train_and_evaluate(config, tmp_path / "b")
    config.model.update(arch="", pretrained=str(tmp_path / "model"))
    config.data.update(crop="resmall", resize=10)
    config.loss.teacher = str(tmp_path / "model")
    train.train_and_evaluate(config, tmp_path / "c")
    assert read == set(flatten(default_config())) | {"optim.args"}


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_a_resnet_trains_continues_and_is_a_checkpoint(config, tmp_path, monkeypatch, batch_norm):
    config.model.update(arch="resnet_mu", dropout=0.0, drop_path=0.0)
    train.train_and_evaluate(config, tmp_path / "scratch")
    model, variables, processor = pretrained.load(tmp_path / "scratch")
    assert model.config.image_size == (8, 8)
    averaged = final_items(tmp_path / "scratch", 8)["ema"]
    _, last, _ = pretrained.load(f"{tmp_path}/scratch@8")
    jax.tree.map(np.testing.assert_array_equal, last, averaged)

    pretrained.save(tmp_path / "model", model, variables, processor)
    config.model.update(
        arch="", pretrained=str(tmp_path / "model"), head="keep", batch_norm=batch_norm
    )
    whole = train.train_and_evaluate(config, tmp_path / "whole")
    assert np.isfinite(whole["splits"]["test"]["loss"])
    items = final_items(tmp_path / "whole", 8)
    if batch_norm == "train":
        with monkeypatch.context() as patch:
            interrupt_at(3, patch)
            with pytest.raises(Interrupted, match="SIGTERM: saved after step 3 of 8"):
                train.train_and_evaluate(config, tmp_path / "parts")
        train.train_and_evaluate(config, tmp_path / "parts")
        jax.tree.map(np.testing.assert_array_equal, items, final_items(tmp_path / "parts", 8))
    for item in ("params", "ema"):
        same = jax.tree.map(
            np.array_equal, items[item]["batch_stats"], dict(variables["batch_stats"])
        )
        assert set(jax.tree.leaves(same)) == {batch_norm == "frozen"}


def test_a_resnet_refuses_what_it_does_not_have(config, tmp_path):
    config.model.arch = "resnet_mu"
    with pytest.raises(UserError, match="model.dropout=0.1 and model.drop_path=0.1: a ResNet has"):
        train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_attention_that_this_machine_does_not_have_is_refused(config, tmp_path):
    config.model.attention = "cudnn"
    with pytest.raises(UserError, match="needs an NVIDIA GPU .* and here is cpu; use xla"):
        train.train_and_evaluate(config, tmp_path)
    config.model.update(arch="resnet_mu", dropout=0.0, drop_path=0.0)
    with pytest.raises(UserError, match="model.attention='cudnn': a ResNet has no attention"):
        train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("crop", ["inception", "resmall", "none"])
def test_every_crop_trains(config, tmp_path, crop):
    config.data.crop = crop
    config.data.resize = 10
    config.train.total_steps = 1
    config.eval.every_steps = 0
    assert train.train_and_evaluate(config, tmp_path)["step"] == 1


@pytest.fixture
def folder(tmp_path) -> Path:
    """Dark and bright images in the usual formats; of each class one is bad in its own way."""
    rng = np.random.default_rng(0)
    for split, count in [("train", 24), ("test", 8)]:
        for name, low in [("bright", 160), ("dark", 0)]:
            directory = tmp_path / "images" / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(low, low + 90, (20, 16, 3), np.uint8)
                suffix = ("png", "jpg")[number % 2]
                Image.fromarray(pixels).save(directory / f"{number:02}.{suffix}")
    whole = (tmp_path / "images/test/dark/03.jpg").read_bytes()
    (tmp_path / "images/test/dark/03.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/train/bright/05.jpg").write_text("not an image")
    return tmp_path / "images"


def test_a_folder_with_bad_images_trains_when_they_are_skipped(config, folder, tmp_path, capsys):
    config.data.source = f"folder:{folder}"
    config.data.on_error = "skip"
    config.data.holdout = 0.25
    results = train.train_and_evaluate(config, tmp_path / "run")
    test, holdout = results["splits"]["test"], results["splits"]["holdout"]
    assert (test["num_examples"], test["num_skipped"]) == (15, 1)
    assert holdout["num_examples"] + holdout["num_skipped"] == 12
    assert results["train"]["num_skipped"] + holdout["num_skipped"] == 1
    assert "(15 images, 1 skipped)" in capsys.readouterr().out
    lines = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == [
        "test/dark/03.jpg",
        "train/bright/05.jpg",
    ]
    predictions = np.load(tmp_path / "run/predictions/test.npz")
    assert len(predictions["ids"]) == len(predictions["labels"]) == 15
    for name, label in zip(predictions["ids"], predictions["labels"], strict=True):
        assert name.split("/")[1] == ("bright", "dark")[label]
    assert "test/dark/03.jpg" not in predictions["ids"]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["data"]["test"]["listing_sha256"]


def test_a_bad_image_that_is_not_skipped_is_named(config, folder, tmp_path):
    config.data.source = f"folder:{folder}"
    config.eval.update(select_split="", every_steps=0)
    config.train.total_steps = 12  # more than an epoch
    message = "Example train/bright/05.jpg of split 'train' cannot be used: .*on_error='skip'"
    with pytest.raises(UserError, match=message) as error:
        train.train_and_evaluate(config, tmp_path / "run")
    assert error.value.exit_code == 2
    assert not (tmp_path / "run/skipped.jsonl").exists()
