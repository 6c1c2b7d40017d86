"""Weights & Biases gets the metrics; whatever goes wrong there, training goes on."""

import json
import logging
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitcls import train
from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.logs import wandb_sender
from vitcls.logs.writers import MetricWriter
from vitcls.provenance import run_logs

ROOT = Path(__file__).parents[2]
# A client that writes down what it is told, or behaves as FAULT says.
FAKE = """
import json, os, signal, time

def note(what, content):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([what, content]) + "\\n")

def Settings(**kwargs):
    return kwargs

def teardown():
    note("teardown", None)

class Run:
    offline, url = False, "https://example.org/run"
    def define_metric(self, name, step_metric): note("metric", [name, step_metric])
    def log(self, scalars): note("log", scalars)
    def finish(self, exit_code): note("finish", exit_code)

def init(mode=None, **asked):
    fault = os.environ.get("FAULT")
    if fault == "end":
        os._exit(1)
    if fault == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "network" and mode != "offline":
        raise OSError("no such host")
    note("init", asked | {"mode": mode})
    return Run()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Puts the fake in the real one's place; returns a function that reads what it noted."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)

    def read():
        path = tmp_path / "notes"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read


def open_writer(workdir, **kwargs):
    workdir.mkdir(exist_ok=True)
    kwargs = dict(start_step=0, wandb_project="flowers", config={"optim": {"lr": 0.5}}) | kwargs
    return MetricWriter(workdir, **kwargs)


def test_a_restart_goes_on_in_the_same_run(notes, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "run") as writer:
        writer.write(10, {"train/loss": 2.0})
        writer.write(20, {"train/loss": 1.0})
        raise KeyboardInterrupt
    with open_writer(tmp_path / "run", start_step=10) as writer:
        writer.write(20, {"train/loss": 1.0})
    (first, second) = [asked for what, asked in notes() if what == "init"]
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("flowers", "run", "allow")
    assert first["id"] == (tmp_path / "run/wandb_id").read_text() and len(first["id"]) == 8
    assert first["dir"] == str(tmp_path / "run") and first["config"] == {"optim": {"lr": 0.5}}
    assert [content for what, content in notes() if what in ("metric", "log", "finish")] == [
        ["*", "step"], {"step": 10, "train/loss": 2.0}, {"step": 20, "train/loss": 1.0}, 1,
        ["*", "step"], {"step": 20, "train/loss": 1.0}, 0,
    ]  # fmt: skip
    assert "Weights & Biases: https://example.org/run" in capfd.readouterr().err
    with open_writer(tmp_path / "other"):
        pass
    assert (tmp_path / "other/wandb_id").read_text() != first["id"]


def test_a_killed_run_is_ended_as_failed(notes):
    told = '{"project": "p", "dir": "d"}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo'
    command = [sys.executable, "-m", "vitcls.logs.wandb_sender"]
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    subprocess.run(
        command, input=told, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert [content for what, content in notes() if what in ("log", "finish")] == [
        {"step": 1, "loss": 1.0}, 1,
    ]  # fmt: skip


def test_without_network_it_is_kept_for_later(notes, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAULT", "network")
    with open_writer(tmp_path / "run") as writer:
        writer.write(1, {"train/loss": 1.0})
    assert [what for what, _ in notes()] == ["teardown", "init", "metric", "log", "finish"]
    assert notes()[1][1]["mode"] == "offline"
    said = capfd.readouterr().err
    assert f"no such host\nIt keeps this run's metrics in {tmp_path}/run/wandb; later" in said
    assert "example.org" not in said


@pytest.mark.parametrize("fault", ["end", "hang"])
def test_what_ends_or_hangs_neither_ends_nor_stalls_a_run(
    notes, tmp_path, monkeypatch, caplog, fault
):
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(wandb_sender, "_FINISH_SECS", 0.2)
    monkeypatch.setattr(wandb_sender, "_GRACE_SECS", 0.2)
    start = time.monotonic()
    with open_writer(tmp_path / "run") as writer:
        sender = writer._sinks[-1]
        for step in range(400):  # more than a pipe holds
            writer.write(step, {f"train/{'long' * 60}": 1.0})
            # A process that ends late would first look like one that falls behind.
            if fault == "end" and step == 0:
                sender._process.wait()
    assert time.monotonic() - start < 30
    assert sender._process.returncode is not None
    assert caplog.text.count("Weights & Biases gets no more of this run") == 1
    assert caplog.text.count("Weights & Biases falls behind") == (fault == "hang")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 400
    assert not notes()


def test_only_the_first_process_opens_it(tmp_path):
    with open_writer(tmp_path / "run", is_main=False) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert not list((tmp_path / "run").iterdir())


def test_a_missing_package_is_named_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = default_config()
    config.data.update(source="folder:no/images", image_size=(8, 8))
    config.model.arch, config.train.total_steps = "vit_mu4", 1
    config.log.wandb_project = "flowers"
    with pytest.raises(
        UserError, match="'flowers' needs the package wandb, .*requirements-wandb.txt"
    ):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_shown_with_its_config(digits_dir, tmp_path, monkeypatch):
    class Opened(Exception):
        pass

    def opened(workdir, **kwargs):
        raise Opened(workdir, kwargs)

    monkeypatch.setattr(run_logs, "MetricWriter", opened)
    config = default_config()
    config.data.update(source="digits", data_dir=digits_dir, image_size=(8, 8))
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=1, global_batch_size=8)
    config.log.wandb_project = "flowers"
    with pytest.raises(Opened) as error:
        train.train_and_evaluate(config, tmp_path / "run")
    workdir, kwargs = error.value.args
    assert workdir == tmp_path / "run" and kwargs["wandb_project"] == "flowers"
    saved = json.loads((workdir / "config.json").read_text())
    assert json.loads(json.dumps(kwargs["config"])) == saved


def records(path: Path) -> list:
    """What the client's own file holds: a LevelDB log, here below one block, of its messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, found, start = path.read_bytes(), [], 7  # after the file's own header
    while start < len(content):  # checksum, length and kind, then a message
        length, kind = struct.unpack("<HB", content[start + 4 : start + 7])
        assert kind == 1, "more than a block"
        found.append(Record.FromString(content[start + 7 : start + 7 + length]))
        start += 7 + length
    return found


def test_the_real_client_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_writer(tmp_path / "run") as writer:
        for step in (10, 20):
            writer.write(step, {"train/loss": step / 10})
    key = (tmp_path / "run/wandb_id").read_text()
    (path,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{key}/run-{key}.wandb")
    found = records(path)
    (run,) = [record.run for record in found if record.HasField("run")]
    assert (run.project, run.run_id, run.display_name) == ("flowers", key, "run")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["optim"] == {
        "lr": 0.5
    }
    lines = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in h.history.item}
        for h in found
        if h.HasField("history")
    ]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(10, 1.0), (20, 2.0)]
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]
