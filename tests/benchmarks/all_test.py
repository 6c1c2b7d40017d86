"""One table of all benchmarks: what was measured, and why the rest was not."""

import json

import pytest

from benchmarks import all as all_benchmarks
from benchmarks.all import Job


def test_every_job_has_rows_and_the_most_important_come_first():
    for platform in ("cpu", "gpu"):
        jobs = all_benchmarks.jobs(platform)
        assert jobs[0].name == "train_step" and "--model=vit_b16" in jobs[0].args
        assert {job.name for job in jobs} == set(all_benchmarks.ROWS)


def test_the_table_says_what_was_measured_and_what_was_not(tmp_path, monkeypatch, capsys):
    small = ("--model=vit_mu16", "--image_size=16", "--peer=none", "--window_secs=0.05")
    jobs = [
        Job("forward", small),
        Job("train_step", ("--model=vit_none16",)),
        Job("input_pipeline", (), ("no_such_package",)),
    ]
    monkeypatch.setattr(all_benchmarks, "jobs", lambda platform: jobs)
    # Eight devices would share the threads that large products need.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setattr("sys.argv", ["all", f"--output={tmp_path / 'speed'}", "--windows=2"])
    all_benchmarks.main()
    text = (tmp_path / "speed.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3  # the header, the rule, and what was measured
    assert rows[2][0] == "| evaluation, vit_mu16, 16 px, batch 8, float32, images/s"
    figures = json.loads((tmp_path / "speed.json").read_text())[0]["figures"]
    assert float(rows[2][1].split()[0]) == pytest.approx(
        figures["ours"]["images_per_second"]["median"], rel=0.01
    )
    assert "`train_step --model=vit_none16`: failed with exit code 2" in text
    assert "`input_pipeline`: not here: no_such_package" in text
    assert text in capsys.readouterr().out


def test_no_job_begins_once_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["all", f"--output={tmp_path / 'speed'}", "--minutes=1e-9"])
    monkeypatch.setattr(all_benchmarks, "missing", lambda job: [])
    all_benchmarks.main()
    text = (tmp_path / "speed.md").read_text()
    assert text.count("the time was over") == len(all_benchmarks.jobs("cpu"))
