"""Trials: their folders, their checks, and what is said about mistakes."""

import json
import re
from pathlib import Path

import pytest

from launch import trials as trials_lib
from vitcls.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/quickstart.py")


def make(sweep, workdir, *, overrides=(), config=CONFIG):
    return trials_lib.make_trials(sweep, config, list(overrides), workdir)


def test_a_trial_is_what_its_command_reads(tmp_path):
    fields = {"optim.lr": 0.5, "data.image_size": (32, 16), "config": "init=scratch"}
    (trial,) = make([fields], tmp_path, overrides=["--config.augment.flip=True"])
    config = trial.config
    assert (config.optim.lr, config.data.image_size, config.augment.flip) == (0.5, (32, 16), True)
    assert config.model.arch == "vit_nano4"
    assert trial.command[3:] == [
        f"--config={CONFIG}:init=scratch", "--config.augment.flip=True", "--config.optim.lr=0.5",
        "--config.data.image_size=(32, 16)", f"--workdir={trial.workdir}",
    ]  # fmt: skip


def test_folders_are_stable_readable_and_distinct(tmp_path):
    sweep = [
        {"optim.lr": 0.001, "train.seed": 3},
        {},
        {"adapt.train": r".*/(a|b)"},
        {"adapt.train": r".*/(a.b)"},
        {"adapt.train": "x" * 300},
    ]
    names = [trial.name for trial in make(sweep, tmp_path)]
    assert names[:2] == ["optim.lr=0.001,train.seed=3", "as-configured"]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.,=+-]{1,130}", name) for name in names)
    assert [trial.name for trial in make(sweep[2:], tmp_path)] == names[2:]


@pytest.mark.parametrize(
    ("sweep", "overrides", "message"),
    [
        ([{"optim.lr": 1}, {"optim.lr": 1}], [], "the same: optim.lr=1"),
        (
            [{"optim.lr": 1}],
            ["--config.optim.lr=2"],
            "the sweep varies optim.lr as well; remove one",
        ),
        ([{"optim.lrr": 1}], [], "Trial optim.lrr=1: Unknown field of config.optim 'lrr'"),
        ([{"optim.lr": 1}, {"optim.lr": -1}], [], "Trial optim.lr=-1: optim.lr=-1.0 is out of"),
        ([{"optim.lr": "fast"}], [], "fast"),
        ([{"config": "init=scrath"}], [], "Did you mean 'scratch'?"),
        ([{"optim.args.ntserov": True}], [], "ntserov"),
    ],
)
def test_mistakes_in_any_trial_stop_all(sweep, overrides, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        make(sweep, tmp_path, overrides=overrides)


def test_a_folder_of_another_sweep_is_refused_but_more_steps_are_not(tmp_path):
    steps = ["--config.train.total_epochs=0", "--config.train.total_steps=50"]
    (trial,) = make([{"optim.lr": 1}], tmp_path, overrides=steps)
    trial.prepare()
    (trial.workdir / "results.json").write_text(json.dumps({"step": 50}))
    (again,) = make([{"optim.lr": 1}], tmp_path, overrides=[*steps, "--config.log.every_steps=7"])
    assert again.results() == {"step": 50}
    (longer,) = make([{"optim.lr": 1}], tmp_path, overrides=[steps[0], steps[1] + "0"])
    assert longer.results() is None
    with pytest.raises(UserError, match="train.global_batch_size: 64 there, 32 asked for"):
        make([{"optim.lr": 1}], tmp_path, overrides=[*steps, "--config.train.global_batch_size=32"])


def test_epochs_are_finished_at_the_steps_that_the_run_made_of_them(tmp_path):
    (trial,) = make([{"optim.lr": 1}], tmp_path)
    trial.prepare()
    assert trial.total_steps() is None
    (trial.workdir / "config.json").write_text(json.dumps({"train": {"total_steps": 203}}))
    (trial.workdir / "results.json").write_text(json.dumps({"step": 202}))
    assert trial.results() is None
    (trial.workdir / "results.json").write_text(json.dumps({"step": 203}))
    assert trial.results() == {"step": 203}
    (longer,) = make([{"optim.lr": 1}], tmp_path, overrides=["--config.train.total_epochs=20"])
    assert longer.results() is None


@pytest.mark.parametrize("name", ["asked.json", "config.json", "results.json"])
@pytest.mark.parametrize("left", ["", '{"train": {"tot'])
def test_a_file_that_is_cut_does_not_stop_the_sweep(name, left, tmp_path):
    (trial,) = make([{"optim.lr": 1}], tmp_path)
    trial.prepare()
    (trial.workdir / "config.json").write_text(json.dumps({"train": {"total_steps": 203}}))
    (trial.workdir / "manifest.json").write_text('{"command": [], "data": {}, "versions": {}}')
    (trial.workdir / "results.json").write_text(json.dumps({"step": 203}))
    (trial.workdir / name).write_text(left)
    (again,) = make([{"optim.lr": 1}], tmp_path)
    assert (again.results() is None) == (name != "asked.json")
    again.prepare()
    assert json.loads((trial.workdir / "asked.json").read_text())["optim"]["lr"] == 1


def test_a_trials_folder_that_is_no_runs_is_refused(tmp_path):
    (tmp_path / "optim.lr=1").mkdir()
    (tmp_path / "optim.lr=1/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="holds config.json, which this command has not written"):
        make([{"optim.lr": 1}], tmp_path)


def test_metrics_and_last_words_are_the_newest(tmp_path):
    (trial,) = make([{"optim.lr": 1}], tmp_path)
    assert trial.metrics() == {} and trial.last_words() == ""
    trial.prepare()
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in range(2000)]
    evaluated = json.dumps({"step": 1999, "holdout/accuracy": 1.0})
    (trial.workdir / "metrics.jsonl").write_text("\n".join([*lines, evaluated, '{"step": 20']))
    assert trial.metrics()["step"] == 1999
    (trial.workdir / "log.txt").write_text("$ a\nERROR: old\n$ b\nSIGTERM: saved\n")
    assert trial.last_words() == "SIGTERM: saved"
    (trial.workdir / "log.txt").write_text("$ a\nhm\nERROR: this\nand that\n")
    assert trial.last_words() == "ERROR: this"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("x = 1", "no function get_sweep()"),
        ("def get_sweep(): return {}", "must return a list of dicts"),
        ("def get_sweep(): return [1]", "must return a list of dicts"),
        ("def get_sweep(): return []", "no trial"),
        ("\ndef get_sweep():\n    return 1 / 0", "line 3: ZeroDivisionError"),
        ("def get_sweep(:", "SyntaxError"),
    ],
)
def test_sweep_files_that_are_none_are_refused(text, message, tmp_path):
    path = tmp_path / "sweep.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        trials_lib.load_sweep(str(path))
