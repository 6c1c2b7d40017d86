"""The pool: order, failures, stops, restarts; with a program in the place of `vitcls.main`."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import local, pool
from launch import trials as trials_lib
from launch.stopping import StopRequest
from vitcls.errors import UserError

ROOT = Path(__file__).parents[2]
# What it does is the trial's warm-up: 1 finishes, 2 fails, 3 is stopped once by somebody else,
# 4 trains until it is asked to stop, 5 and 6 find no devices, on GPU 0 or anywhere.
FAKE = """
import json, os, pathlib, signal, sys, time
workdir, what = pathlib.Path(sys.argv[1]), int(sys.argv[2])
starts = workdir / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if what == 2:
    print("ERROR: diverged"); sys.exit(87)
if what == 6 or (what == 5 and os.environ["CUDA_VISIBLE_DEVICES"] == "0"):
    print("ERROR: no devices"); sys.exit(69)
if what == 3 and starts.read_text() == "x":
    print("SIGTERM: saved"); sys.exit(75)
if what == 4 and starts.read_text() == "x":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (workdir / "trains").touch()
    time.sleep(60)
print("test accuracy", os.environ.get("CUDA_VISIBLE_DEVICES"))
results = {"step": 20, "seconds": 1.0, "splits": {"holdout": {"accuracy": 0.5}}}
(workdir / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pool, "_POLL_SECS", 0.05)
    monkeypatch.setattr(
        trials_lib.Trial, "command",
        property(lambda trial: [
            sys.executable, "-c", FAKE, str(trial.workdir), str(trial.config.optim.warmup_steps),
        ]),
    )  # fmt: skip

    def make(*kinds: int) -> list[trials_lib.Trial]:
        sweep = [{"optim.warmup_steps": kind, "train.seed": i} for i, kind in enumerate(kinds)]
        steps = ["--config.train.total_epochs=0", "--config.train.total_steps=20"]
        return trials_lib.make_trials(sweep, "configs/quickstart.py", steps, tmp_path)

    return make


def starts(trial) -> int:
    path = trial.workdir / "starts"
    return len(path.read_text()) if path.exists() else 0


def test_a_trial_without_devices_starts_again_elsewhere(make, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    trials = make(5, 4, 6)  # the second keeps GPU 1 from the first, which waits for it
    runner = pool.Pool(trials, jobs=2, on_change=lambda: None)

    def free_gpu_1() -> None:
        wait_for(lambda: starts(trials[0]) == 1 and (trials[1].workdir / "trains").exists())
        os.kill(runner._running[trials[1].name][1].pid, signal.SIGTERM)

    helper = threading.Thread(target=free_gpu_1)
    helper.start()
    with StopRequest() as stop:
        runner.run(stop)
    helper.join()
    ends = [runner.states[trial.name] for trial in trials]
    assert [end["state"] for end in ends] == ["finished", "finished", "failed"]
    assert ends[2]["exit_code"] == 69
    assert [starts(trial) for trial in trials] == [2, 2, 4]


def test_one_failure_stops_nobody_and_a_stopped_trial_goes_on(make):
    trials = make(1, 2, 3, 1)
    changes = []
    runner = pool.Pool(trials, jobs=2, on_change=lambda: changes.append(dict(runner.states)))
    with StopRequest() as stop:
        runner.run(stop)
    ends = [runner.states[trial.name] for trial in trials]
    assert [end["state"] for end in ends] == ["finished", "failed", "finished", "finished"]
    assert ends[1]["exit_code"] == 87
    assert [starts(trial) for trial in trials] == [1, 1, 2, 1]
    assert trials[1].last_words() == "ERROR: diverged"
    running = [[s["state"] for s in states.values()].count("running") for states in changes]
    assert max(running) == 2


def test_a_signal_lets_the_running_save_and_starts_no_more(make):
    trials = make(4, 4, 1)
    runner = pool.Pool(trials, jobs=2, on_change=lambda: None)

    def interrupt():
        while not all((trial.workdir / "trains").exists() for trial in trials[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with StopRequest() as stop:
        runner.run(stop)
    thread.join()
    assert [runner.states.get(trial.name) for trial in trials] == [
        {"state": "stopped", "exit_code": 75}, {"state": "stopped", "exit_code": 75}, None,
    ]  # fmt: skip
    again = pool.Pool(trials, jobs=2, on_change=lambda: None)
    with StopRequest() as stop:
        again.run(stop)
    assert all(trial.results() for trial in trials)


def test_gpus_are_shared_out(make, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert pool.share_gpus(2) == ["4,5", "6,7"]
    assert pool.share_gpus(1) == [None]
    with pytest.raises(UserError, match="--jobs=3 cannot share 4 GPUs"):
        pool.share_gpus(3)
    trials = make(1, 1)
    runner = pool.Pool(trials, jobs=2, on_change=lambda: None)
    with StopRequest() as stop:
        runner.run(stop)
    assert [trial.last_words() for trial in trials] == ["test accuracy 4,5", "test accuracy 6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pool.share_gpus(2) == [None, None]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent")
def test_a_run_stops_with_the_process_that_started_it(tmp_path):
    run = "import time, pathlib, sys; pathlib.Path(sys.argv[1]).write_text('x'); time.sleep(60)"
    parent = (
        "import sys, time; from launch import local\n"
        f"print(local.start([sys.executable, '-c', {run!r}, sys.argv[1]]).pid, flush=True)\n"
        "time.sleep(60)"
    )
    flag = tmp_path / "runs"
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(flag)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    wait_for(flag.exists)
    process.kill()
    process.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or is_zombie(child))


def is_zombie(pid: int) -> bool:
    return " Z " in Path(f"/proc/{pid}/stat").read_text()


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("codes", "num_starts", "result"),
    [
        ([0], 1, 0),
        ([2], 1, 2),
        ([87], 1, 87),
        ([75, 75, 75, 75, 0], 5, 0),
        ([1, 75, 86, 0], 4, 0),
        ([69, 75, 69, 0], 4, 0),
        ([69, 69, 69, 0], 3, 69),
        ([1, 1, 86, 1, 0], 3, 86),
    ],
)
def test_what_follows_an_exit_code_here(codes, num_starts, result, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(local, "_POLL_SECS", 0.02)
    monkeypatch.setattr(local, "_PAUSE_SECS", 0)
    monkeypatch.setattr(local, "_NO_DEVICE_PAUSE_SECS", 0)
    count = tmp_path / "count"
    program = (
        "import pathlib, sys; path = pathlib.Path(sys.argv[1])\n"
        "number = len(path.read_text()) if path.exists() else 0\n"
        "path.write_text('x' * (number + 1)); sys.exit(int(sys.argv[2 + number]))"
    )
    command = [sys.executable, "-c", program, str(count), *map(str, codes)]
    assert local.run(command, max_restarts=2) == result
    assert len(count.read_text()) == num_starts
