"""The sweep command: what it refuses, what it would run, and one small sweep for real."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import array
from launch import trials as trials_lib
from launch.resources import Resources
from launch.stopping import StopRequest
from tests import forked

ROOT = Path(__file__).parents[2]
SWEEP = (
    "from launch.space import grid, seeds\n"
    "def get_sweep():\n"
    "    return seeds(grid({'optim.lr': [1e-3, 1e30]}), 2)\n"
)


def sweep(*args: str) -> subprocess.CompletedProcess:
    return forked.run("launch.sweep", "--config=configs/quickstart.py", *args, timeout=600)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=x"], "--sweep is missing"),
        (["--workdir=x", "--sweep=configs/sweeps/none.py"], "--sweep=configs/sweeps/none.py cann"),
        (
            ["--workdir=x", "--sweep=configs/sweeps/lr_wd.py", "--time=9"],
            "--time is for --on=slurm",
        ),
        (["--workdir=x", "--sweep=configs/sweeps/lr_wd.py", "--jobs=0"], "--jobs=0"),
        (["--workdir=x", "--sweep=configs/sweeps/lr_wd.py", "--config.optim.lr=1"], "varies"),
    ],
)
def test_mistakes_exit_2_with_one_message(args, message):
    result = sweep(*args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "configs/sweeps").glob("*.py")])
def test_every_sweep_file_returns_trials(name):
    trials = trials_lib.load_sweep(str(ROOT / "configs/sweeps" / name))
    assert len({json.dumps(trial) for trial in trials}) == len(trials) > 1


def test_dry_run_shows_the_commands_and_makes_nothing(tmp_path):
    result = sweep(
        "--sweep=configs/sweeps/lr_wd.py", f"--workdir={tmp_path}/s", "--dry_run", "--on=slurm",
        "--jobs=3", "--config.log.every_steps=5", "--sbatch=--qos=low",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "#SBATCH --array=0-17%3\n" in result.stdout and "#SBATCH --qos=low\n" in result.stdout
    commands = [shlex.split(line) for line in result.stdout.splitlines() if " -m vitcls" in line]
    assert len(commands) == 18
    assert commands[0][1:] == [
        "-m", "vitcls.main", "--config=configs/quickstart.py", "--config.log.every_steps=5",
        "--config.optim.lr=0.0003", "--config.optim.weight_decay=0.0", "--config.train.seed=0",
        f"--workdir={tmp_path}/s/optim.lr=0.0003,optim.weight_decay=0.0,train.seed=0",
    ]  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_a_second_start_names_the_first_and_runs_nothing(tmp_path):
    program = (
        "import pathlib, sys; from vitcls.folders import lock\n"
        "lock.take(pathlib.Path(sys.argv[1]) / 'lock', verb='run')\n"
        "print('held', flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as first:  # fmt: skip
        assert first.stdout.readline() == b"held\n"
        result = sweep("--sweep=configs/sweeps/lr_wd.py", f"--workdir={tmp_path}")
        first.communicate(b"\n")
    assert result.returncode == 2, result.stderr
    assert f"{tmp_path} is being run by process {first.pid} on " in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_an_array_takes_only_what_is_not_in_the_queue(tmp_path, monkeypatch):
    """With a SLURM that notes what it is given, and finishes a task at each look at its queue."""
    monkeypatch.setattr(array, "_POLL_SECS", 0)
    monkeypatch.setattr(array, "_SETTLE_SECS", 0)
    submitted, queue = [], {}
    fields = [{"optim.lr": rate} for rate in (1, 2, 3)]
    trials = trials_lib.make_trials(
        fields, "configs/quickstart.py", [], tmp_path
    )  # fmt: skip

    def submit(text, path):
        lines = path.with_suffix(".txt").read_text().splitlines()
        submitted.append([Path(line.split("\t")[0]) for line in lines])
        queue.update({(str(len(submitted)), i): "RUNNING" for i in range(len(lines))})
        return str(len(submitted))

    def active_tasks():
        return dict(queue)

    monkeypatch.setattr(array.slurm, "submit", submit)
    monkeypatch.setattr(array.slurm, "active_tasks", active_tasks)
    array.Array(trials[:2], tmp_path, on_change=lambda: None).submit(Resources(), jobs=None)
    runner = array.Array(trials, tmp_path, on_change=lambda: None)
    runner.submit(Resources(), jobs=None)
    assert submitted == [[trials[0].workdir, trials[1].workdir], [trials[2].workdir]]
    for trial in trials[1:]:
        (trial.workdir / "config.json").write_text('{"train": {"total_steps": 9}}')
        (trial.workdir / "results.json").write_text('{"step": 9, "splits": {}}')
    queue.clear()
    with StopRequest() as stop:
        runner.run(stop)
    states = [runner.states[trial.name]["state"] for trial in trials]
    assert states == ["failed", "finished", "finished"]


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_and_runs_nothing_twice(tmp_path, digits_dir):
    (tmp_path / "sweep.py").write_text(SWEEP)
    args = [
        f"--sweep={tmp_path}/sweep.py", f"--workdir={tmp_path}/s", "--jobs=2",
        f"--config.data.data_dir={digits_dir}", "--config.train.total_epochs=0",
        "--config.train.total_steps=6", "--config.optim.warmup_steps=1",
    ]  # fmt: skip
    result = sweep(*args)
    assert result.returncode == 1, result.stderr
    assert "2 of 4 trials failed" in result.stderr and "failed with code 87" in result.stderr
    head, row = result.stdout.splitlines()[1:]
    assert head.split() == ["optim.lr", "holdout/accuracy", "test/accuracy", "seeds"]
    assert re.fullmatch(r"0\.001 .*\(.* to .*\) .*\(.* to .*\) +2", row)
    (line,) = csv.DictReader((tmp_path / "s/sweep.csv").open())
    folders = [tmp_path / f"s/optim.lr=0.001,train.seed={seed}" for seed in (0, 1)]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    accuracies = [found["splits"]["test"]["accuracy"] for found in results]
    assert float(line["test/accuracy mean"]) == pytest.approx(sum(accuracies) / 2)
    times = [os.stat(folder / "results.json").st_mtime_ns for folder in folders]
    again = sweep(*args)
    assert "4 trials, 2 finished before" in again.stderr
    assert times == [os.stat(folder / "results.json").st_mtime_ns for folder in folders]
