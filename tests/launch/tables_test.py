"""What a sweep's table says, against the statistics module and the csv reader."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from launch import tables
from launch import trials as trials_lib
from vitcls.errors import UserError

CONFIG = str(Path(__file__).parents[2] / "configs/quickstart.py")
# (learning rate, seed) -> (holdout accuracy, test accuracy); None is not finished.
RESULTS = {
    (1.0, 0): (0.5, 0.4), (1.0, 1): (0.7, 0.9), (1.0, 2): (0.9, 0.5),
    (2.0, 0): (0.8, 0.3), (2.0, 1): None,
    (3.0, 0): None,
}  # fmt: skip


def make(tmp_path, *overrides):
    sweep = [{"optim.lr": lr, "train.seed": seed} for lr, seed in RESULTS]
    steps = ["--config.train.total_epochs=0", "--config.train.total_steps=20"]
    trials = trials_lib.make_trials(sweep, CONFIG, [*steps, *overrides], tmp_path)
    for trial, found in zip(trials, RESULTS.values(), strict=True):
        if found:
            trial.prepare()
            splits = dict(zip(("holdout", "test"), ({"accuracy": x} for x in found), strict=True))
            splits["test"]["loss"] = 1 - found[1]
            results = {"step": 20, "seconds": 1.0, "splits": splits}
            (trial.workdir / "results.json").write_text(json.dumps(results))
    return trials


def test_groups_are_over_seeds_with_the_best_selection_first(tmp_path):
    first, second = tables.group_trials(make(tmp_path), [])
    assert first["fields"] == {"optim.lr": 2.0} and first["seeds"] == [0]
    assert second["fields"] == {"optim.lr": 1.0} and second["seeds"] == [0, 1, 2]
    assert second["metrics"]["test/accuracy"] == {
        "mean": pytest.approx(statistics.mean([0.4, 0.9, 0.5])), "lowest": 0.4, "highest": 0.9,
    }  # fmt: skip
    assert list(second["metrics"]) == ["holdout/accuracy", "test/accuracy"]


def test_what_is_no_number_or_missing_is_last(tmp_path, monkeypatch):
    nan = float("nan")
    results = {(1.0, 0): (nan, 0.4), (1.0, 1): (0.9, nan), (1.0, 2): (0.99, 0.1),
               (2.0, 0): (0.5, 0.3), (2.0, 1): None, (3.0, 0): (0.5, 0.2)}  # fmt: skip
    monkeypatch.setattr(f"{__name__}.RESULTS", results)
    for metric, overrides in (("accuracy", []), ("loss", ["--config.eval.select_metric=loss"])):
        trials = make(tmp_path / metric, *overrides)
        if metric == "loss":
            for path in (tmp_path / metric).glob("*/results.json"):
                path.write_text(path.read_text().replace('ut": {"accuracy"', 'ut": {"loss"'))
        groups = tables.group_trials(trials, [])
        assert [group["fields"]["optim.lr"] for group in groups] == [2.0, 3.0, 1.0]
        assert np.isnan(list(groups[2]["metrics"][f"holdout/{metric}"].values())).all()
        (trials[3].workdir / "results.json").write_text(
            json.dumps({"step": 20, "splits": {"holdout": {}, "test": {"accuracy": 0.9}}})
        )
        groups = tables.group_trials(trials, [])
        assert [group["fields"]["optim.lr"] for group in groups] == [3.0, 1.0, 2.0]


def test_nothing_is_sorted_by_the_test_split(tmp_path):
    trials = make(tmp_path, "--config.eval.select_split=")
    groups = tables.group_trials(trials, [])
    assert [group["fields"]["optim.lr"] for group in groups] == [1.0, 2.0]
    assert [list(group["metrics"]) for group in groups] == [["test/accuracy"]] * 2


def test_the_text_has_a_line_per_group(tmp_path):
    text = tables.format_table(
        tables.group_trials(make(tmp_path), ["test/loss", "test/tail_accuracy"])
    )
    head, first, second = text.splitlines()
    assert head.split() == ["optim.lr", "holdout/accuracy", "test/loss", "seeds"]
    same, spread = ("0.8000 (0.8000 to 0.8000)", "0.7000 (0.7000 to 0.7000)"), "(0.5000 to 0.9000)"
    assert " ".join(first.split()) == f"2.0 {same[0]} {same[1]} 1"
    assert " ".join(second.split()) == f"1.0 0.7000 {spread} 0.4000 (0.1000 to 0.6000) 3"


def test_files_hold_what_the_table_says(tmp_path):
    trials = make(tmp_path)
    states = {trials[4].name: {"state": "failed", "exit_code": 87}}
    tables.write_tables(tmp_path, trials, states, [])
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["groups"] == tables.group_trials(trials, [])
    by_state = [(trial["state"], trial["exit_code"]) for trial in found["trials"]]
    assert by_state == [("finished", 0)] * 4 + [("failed", 87), ("waiting", None)]
    assert found["trials"][1]["metrics"] == {"holdout/accuracy": 0.7, "test/accuracy": 0.9}
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["optim.lr"] for row in rows] == ["2.0", "1.0"]
    assert float(rows[1]["test/accuracy highest"]) == 0.9 and rows[1]["seeds"] == "3"


@pytest.mark.parametrize(
    ("name", "message"),
    [("tst/loss", "Unknown split of --metrics 'tst'"), ("test/lss", "Did you mean 'loss'?")],
)
def test_unknown_metrics_are_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tables.check_metrics([name], make(tmp_path))
