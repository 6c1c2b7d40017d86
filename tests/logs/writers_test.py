"""Metrics reach both files; a restart neither loses nor doubles a line; divergence stops."""

import json
import logging
import resource
import struct

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from vitcls.errors import NonFiniteLoss
from vitcls.logs.progress import Progress
from vitcls.logs.writers import LateMetrics, MetricWriter


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    with MetricWriter(tmp_path, start_step=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"train/loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tra')  # killed in the middle of a line
    with MetricWriter(tmp_path, start_step=20) as writer:
        writer.write(30, {"train/loss": 7.0})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (10, 1.0),
        (20, 2.0),
        (30, 7.0),
    ]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_an_evaluation_that_is_done_again_is_written_once(tmp_path):
    with MetricWriter(tmp_path, start_step=0) as writer:
        writer.write(20, {"holdout/loss": 1.0})
        writer.write(20, {"test/loss": 2.0})
    with MetricWriter(tmp_path, start_step=20, again=("test",)) as writer:
        writer.write(20, {"test/loss": 2.0})
    assert [set(line) - {"step", "time"} for line in lines(tmp_path)] == [
        {"holdout/loss"},
        {"test/loss"},
    ]


def late_metrics(writer, progress, **kwargs):
    kwargs = dict(every_steps=2, window=[], max_nonfinite=3) | kwargs
    return LateMetrics(writer, progress, ids=lambda step: [f"image {step}"] * 6, **kwargs)


def step_metrics(loss, *, lr=0.1, grad_norm=1.0, total=0, in_row=0):
    metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr}
    skips = {"total": jnp.asarray(total), "in_row": jnp.asarray(in_row)}
    return {name: jnp.asarray(value) for name, value in metrics.items()} | {"skips": skips}


def test_means_over_a_window_are_written_one_step_late(tmp_path):
    with (
        MetricWriter(tmp_path, start_step=0) as writer,
        Progress(0, 4, global_batch_size=8) as progress,
    ):
        metrics = late_metrics(writer, progress)
        for step, loss in [(1, 1.0), (2, 2.0), (3, 5.0), (4, 7.0)]:
            metrics.add(step, step_metrics(loss, lr=step / 10))
            progress.step_done()
        assert len(lines(tmp_path)) == 1
        metrics.flush()
    first, second = lines(tmp_path)
    assert (first["step"], first["train/loss"], second["train/loss"]) == (2, 1.5, 6.0)
    assert first["train/lr"] == pytest.approx(0.2)  # of the last step, not a mean
    assert 0 <= first["train/waiting"] <= 1
    assert not (tmp_path / "nonfinite.jsonl").exists()


def test_skipped_steps_are_named_counted_and_left_out_of_means(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    nan = float("nan")
    with (
        MetricWriter(tmp_path, start_step=0) as writer,
        Progress(0, 4, global_batch_size=8) as progress,
    ):
        metrics = late_metrics(writer, progress)
        metrics.add(1, step_metrics(3.0))
        metrics.add(2, step_metrics(nan, grad_norm=nan, total=1, in_row=1))
        metrics.add(3, step_metrics(1.0, grad_norm=nan, total=2, in_row=2))
        metrics.add(4, step_metrics(nan, total=3, in_row=3))
        assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(2, 3.0)]
        assert lines(tmp_path)[0]["train/num_nonfinite"] == 1
        with pytest.raises(NonFiniteLoss, match="Step 4 diverged, .* last 3 .*lower optim.lr"):
            metrics.flush()
    assert "Step 2 is skipped, 1 in a row: loss nan, gradient norm nan; images image 2, " in (
        caplog.text
    )
    skipped = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in skipped] == [
        (2, "nan"),
        (3, "1.0"),
        (4, "nan"),
    ]
    assert skipped[0]["ids"] == ["image 2"] * 6
    with MetricWriter(tmp_path, start_step=2):  # continued after step 2: the others come again
        assert len((tmp_path / "nonfinite.jsonl").read_text().splitlines()) == 1


def test_steps_without_images_are_named_and_left_out_of_means(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    with (
        MetricWriter(tmp_path, start_step=0) as writer,
        Progress(0, 2, global_batch_size=8) as progress,
    ):
        metrics = late_metrics(writer, progress)
        metrics.add(1, step_metrics(3.0) | {"is_empty": jnp.asarray(False)})
        metrics.add(2, step_metrics(0.0, in_row=1) | {"is_empty": jnp.asarray(True)})
        metrics.flush()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(2, 3.0)]
    assert "train/is_empty" not in lines(tmp_path)[0]
    assert "Step 2 changes nothing: no image of its batch counts." in caplog.text
    assert not (tmp_path / "nonfinite.jsonl").exists()


def test_event_files_are_those_that_another_library_reads(tmp_path):
    with MetricWriter(tmp_path, start_step=4) as writer:
        writer.write(5, {"train/loss": 1.5})
        writer.write(6, {"train/loss": 0.5, "train/lr": 0.25})
        (path,) = tmp_path.glob("events.out.tfevents.*")
        content = path.read_bytes()  # whole at any time
    events, start = [], 0
    while start < len(content):  # a TFRecord is a length, its checksum, data and their checksum
        (length,) = struct.unpack("<Q", content[start : start + 8])
        events.append(event_pb2.Event.FromString(content[start + 12 : start + 12 + length]))
        start += length + 16
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (5, 1)  # purges what came after
    assert [(e.step, v.tag, v.simple_value) for e in events[2:] for v in e.summary.value] == [
        (5, "train/loss", 1.5),
        (6, "train/loss", 0.5),
        (6, "train/lr", 0.25),
    ]


def test_a_full_disk_delays_lines_and_neither_loses_one_nor_hangs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricWriter(tmp_path, start_step=0) as writer:
        writer.write(1, {"train/loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            for step in range(2, 40):
                writer.write(step, {"train/loss": float(step)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len((tmp_path / "metrics.jsonl").read_bytes()) == 100
        assert "Metrics of step 39 are kept in memory" in caplog.text
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 40))
