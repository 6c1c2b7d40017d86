"""Metrics reach both files; a restart neither loses nor doubles a line; divergence stops."""

import json

import jax.numpy as jnp
import pytest

from vitcls.errors import NonFiniteLoss
from vitcls.metric_writers import LateMetrics, MetricWriter
from vitcls.progress import Progress


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


def test_means_over_a_window_are_written_one_step_late(tmp_path):
    with (
        MetricWriter(tmp_path, start_step=0) as writer,
        Progress(0, 4, global_batch_size=8) as progress,
    ):
        metrics = LateMetrics(writer, progress, every_steps=2, window=[])
        for step, loss in [(1, 1.0), (2, 2.0), (3, 5.0), (4, 7.0)]:
            metrics.add(step, {"loss": jnp.asarray(loss), "lr": jnp.asarray(step / 10)})
            progress.step_done()
        assert len(lines(tmp_path)) == 1
        metrics.flush()
    first, second = lines(tmp_path)
    assert (first["step"], first["train/loss"], second["train/loss"]) == (2, 1.5, 6.0)
    assert first["train/lr"] == pytest.approx(0.2)  # of the last step, not a mean
    assert 0 <= first["train/waiting"] <= 1


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_non_finite_metrics_stop_the_run(tmp_path, name):
    with (
        MetricWriter(tmp_path, start_step=0) as writer,
        Progress(0, 4, global_batch_size=8) as progress,
    ):
        metrics = LateMetrics(writer, progress, every_steps=1, window=[])
        values = {"loss": jnp.asarray(1.0), "grad_norm": jnp.asarray(1.0)}
        metrics.add(7, values | {name: jnp.asarray(jnp.nan)})
        with pytest.raises(NonFiniteLoss, match="Step 7 diverged.*lower optim.lr"):
            metrics.flush()
