"""What a sweep found: trials grouped by everything but the seed, as text, CSV and JSON."""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

from launch.trials import SEED, Trial
from vitcls.records import write_json, written_aside


def select_metric(trial: Trial) -> str | None:
    """Returns the metric that chose the trial's checkpoint, `holdout/accuracy`; None without."""
    split, metric = trial.config.eval.select_split, trial.config.eval.select_metric
    return f"{split}/{metric}" if split else None


def metrics(trial: Trial) -> dict[str, float]:
    """Returns what a finished trial is compared by: selection metric, accuracies; else {}."""
    results = trial.results()
    if results is None:
        return {}
    names = [f"{split}/accuracy" for split in trial.config.data.eval_splits]
    found = {}
    for name in filter(None, dict.fromkeys([select_metric(trial), *names])):
        split, metric = name.split("/")
        found[name] = results["splits"][split][metric]
    return found


def groups(trials: list[Trial]) -> list[dict[str, Any]]:
    """Returns the finished trials by fields other than the seed, best selection metric first.

    Each group is `{"fields": {...}, "seeds": [0, 1], "metrics": {"test/accuracy": {"mean": 0.97,
    "lowest": 0.96, "highest": 0.98}}}`; without a selection metric the sweep's order is kept, since
    the test split chooses nothing.
    """
    members = {}
    for trial in trials:
        fields = {field: value for field, value in trial.fields.items() if field != SEED}
        if found := metrics(trial):
            members.setdefault(json.dumps(fields, default=str), []).append((trial, fields, found))
    by_group = [_group(rows) for rows in members.values()]
    selects = {select_metric(trial) for trial in trials}
    if len(selects) == 1 and None not in selects:
        (name,) = selects
        by_group.sort(
            key=lambda group: group["metrics"][name]["mean"], reverse=not name.endswith("/loss")
        )
    return by_group


def _group(rows: list[tuple[Trial, dict, dict]]) -> dict[str, Any]:
    summary = {}
    for name in rows[0][2]:
        values = [found[name] for _, _, found in rows]
        summary[name] = {
            "mean": statistics.fmean(values), "lowest": min(values), "highest": max(values)
        }  # fmt: skip
    seeds = [trial.config.train.seed for trial, _, _ in rows]
    return {"fields": rows[0][1], "seeds": seeds, "metrics": summary}


def text(by_group: list[dict[str, Any]]) -> str:
    """Returns the groups as lines of aligned columns: mean (lowest to highest) of each metric."""
    fields, names = _columns(by_group)
    lines = [[*fields, *names, "seeds"]]
    for group in by_group:
        cells = [str(group["fields"].get(field, "")) for field in fields]
        for name in names:
            values = group["metrics"].get(name)
            cells.append(values and "{mean:.4f} ({lowest:.4f} to {highest:.4f})".format(**values))
        lines.append([cell or "" for cell in cells] + [str(len(group["seeds"]))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _columns(by_group: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    fields = dict.fromkeys(field for group in by_group for field in group["fields"])
    names = dict.fromkeys(name for group in by_group for name in group["metrics"])
    return list(fields), list(names)


def write(workdir: Path, trials: list[Trial], ends: dict[str, dict[str, Any]]) -> None:
    """Writes `sweep.json` (trials and groups) and `sweep.csv` (one line per group).

    Args:
      workdir: The sweep's folder.
      trials: All of them.
      ends: By trial, how those ended that did not finish: `{"state": "failed", "exit_code": 87}`.
    """
    rows = []
    for trial in trials:
        results = trial.results()
        state = {"state": "finished", "exit_code": 0} if results else ends.get(trial.name)
        rows.append(
            {"name": trial.name, "fields": trial.fields, "command": trial.command}
            | (state or {"state": "waiting", "exit_code": None})
            | {"seconds": results and results["seconds"], "metrics": metrics(trial)}
        )
    by_group = groups(trials)
    write_json(workdir / "sweep.json", {"trials": rows, "groups": by_group})
    fields, names = _columns(by_group)
    kinds = ("mean", "lowest", "highest")
    with written_aside(workdir / "sweep.csv") as aside, aside.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*fields, "seeds", *(f"{name} {kind}" for name in names for kind in kinds)])
        for group in by_group:
            values = [group["metrics"].get(name, {}).get(kind) for name in names for kind in kinds]
            chosen = [group["fields"].get(field) for field in fields]
            table.writerow([*chosen, len(group["seeds"]), *values])
