"""Results of a sweep: trials grouped by everything but the seed, as text, CSV and JSON."""

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

from launch.trials import SEED, Trial
from vitcls.config.fields import SELECT_METRICS
from vitcls.errors import unknown
from vitcls.files import write_json, written_aside

_METRICS = (*SELECT_METRICS, "head_accuracy", "medium_accuracy", "tail_accuracy")


def select_metric(trial: Trial) -> str | None:
    """Returns the metric that chose the trial's checkpoint, such as `holdout/accuracy`, or None."""
    split, metric = trial.config.eval.select_split, trial.config.eval.select_metric
    return f"{split}/{metric}" if split else None


def check_metrics(names: list[str], trials: list[Trial]) -> None:
    """Raises `UserError` if one of the names is not a `SPLIT/METRIC` of all trials."""
    for name in names:
        split, _, metric = name.partition("/")
        for trial in trials:
            splits = [*trial.config.data.eval_splits, trial.config.eval.select_split]
            if split not in splits:
                raise unknown("split of --metrics", split, filter(None, splits))
        if metric not in _METRICS:
            raise unknown("metric of --metrics", metric, _METRICS)


def compared_metrics(trial: Trial, names: list[str]) -> dict[str, float]:
    """Returns the metrics to compare of a finished trial, {} for others.

    Args:
      trial: The trial.
      names: `SPLIT/METRIC` besides the selection metric; []: accuracy on each eval split.
    """
    results = trial.results()
    if results is None:
        return {}
    names = names or [f"{split}/accuracy" for split in trial.config.data.eval_splits]
    found = {}
    for name in filter(None, dict.fromkeys([select_metric(trial), *names])):
        split, metric = name.split("/")
        if metric in results["splits"][split]:  # no tail_accuracy without rare classes
            found[name] = results["splits"][split][metric]
    return found


def group_trials(trials: list[Trial], names: list[str]) -> list[dict[str, Any]]:
    """Groups the finished trials by fields other than the seed, best selection metric first.

    Each group is `{"fields": {...}, "seeds": [0, 1], "metrics": {"test/accuracy": {"mean": 0.97,
    "lowest": 0.96, "highest": 0.98}}}`. Groups with a NaN or missing metric come last. Without a
    selection metric the sweep's order stays, since the test split must not choose. `names`: see
    `compared_metrics`.
    """
    members = {}
    for trial in trials:
        fields = {field: value for field, value in trial.fields.items() if field != SEED}
        if found := compared_metrics(trial, names):
            members.setdefault(json.dumps(fields, default=str), []).append((trial, fields, found))
    by_group = [_group(rows) for rows in members.values()]
    selects = {select_metric(trial) for trial in trials}
    if len(selects) == 1 and None not in selects:
        (name,) = selects
        sign = 1 if name.endswith("/loss") else -1
        by_group.sort(key=lambda group: _worst_last(sign, group["metrics"].get(name)))
    return by_group


def _worst_last(sign: int, values: dict[str, float] | None) -> float:
    mean = math.nan if values is None else values["mean"]
    return sign * mean if math.isfinite(mean) else math.inf


def _group(rows: list[tuple[Trial, dict, dict]]) -> dict[str, Any]:
    summary = {}
    for name in dict.fromkeys(name for _, _, found in rows for name in found):
        values = [found[name] for _, _, found in rows if name in found]
        # With a NaN among the values, min and max would depend on their order.
        kinds = {"mean": statistics.fmean, "lowest": min, "highest": max}
        is_nan = any(math.isnan(value) for value in values)
        summary[name] = {kind: math.nan if is_nan else of(values) for kind, of in kinds.items()}
    seeds = [trial.config.train.seed for trial, _, _ in rows]
    return {"fields": rows[0][1], "seeds": seeds, "metrics": summary}


def format_table(by_group: list[dict[str, Any]]) -> str:
    """Returns the groups as a table of text: mean (lowest to highest) of each metric."""
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


def write_tables(
    workdir: Path, trials: list[Trial], states: dict[str, dict[str, Any]], names: list[str]
) -> None:
    """Writes `sweep.json` (trials and groups) and `sweep.csv` (one line per group).

    Args:
      workdir: The sweep's folder.
      trials: All trials.
      states: `{"state": "failed", "exit_code": 87}` by trial name, for the started trials.
      names: See `compared_metrics`.
    """
    rows = []
    for trial in trials:
        results = trial.results()
        state = states.get(trial.name, {"state": "waiting", "exit_code": None})
        rows.append(
            {"name": trial.name, "fields": trial.fields, "command": trial.command}
            | ({"state": "finished", "exit_code": 0} if results else state)
            | {"seconds": results and results["seconds"], "metrics": compared_metrics(trial, names)}
        )
    by_group = group_trials(trials, names)
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
