"""Writes a comparison as Markdown, CSV, PNG and one HTML page."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vitcls.analysis import classification, figures, paired, tables
from vitcls.analysis.comparison import LOWER_IS_BETTER, Comparison, Pair
from vitcls.analysis.groups import Group, describe
from vitcls.analysis.page import environment, shorten, visible

_MAX_LINES = 6  # groups in one plot, one for each colour
_MAX_CURVES = 4  # plots
_MAX_DOTS = 40  # pairs in one picture
_GROUPS = ("group", "differs in", "seeds", "mean", "spread", "95 % interval over seeds")
_PAIRS = ("pair", "difference", "95 % interval", "p", "p, Holm", "McNemar, by seed", "weighed")
_NOTHING = "The runs differ in nothing but the seed: there is one group."

MODELLED = (
    "Intervals (95 %) and tests of differences between groups are paired by image, over "
    f"{classification.NUM_RESAMPLES} resamples of the images. If both groups have two or more "
    "seeds, they also count the variation between seeds, with Student's t. It comes from the "
    "differences between runs of the same seed if both groups have the same seeds, otherwise from "
    "the spread in each group. If a group has one seed, they say nothing about other seeds. Two "
    "groups of one run each get the exact McNemar test, for metrics that count right images. p "
    "values are corrected for the number of comparisons (Holm); intervals are not. The seeds and "
    "images needed are those that would show the observed difference with 80 % power. The choice "
    "of training images, which all runs share, does not count."
)


def summaries(found: Comparison) -> list[dict[str, Any]]:
    """A dict per group: `group`, `values`, and `mean`, `spread`, `low`, `high` over seeds."""
    rows = []
    for group in found.groups:
        values = [found.values[i] for i in group.runs]
        numbers = paired.over_seeds(np.array(values))
        names = ("mean", "spread", "low", "high")
        rows.append(
            {"group": group, "values": values} | dict(zip(names, numbers, strict=True))
        )  # fmt: skip
    return rows


def to_markdown(found: Comparison) -> str:
    """The comparison as it is printed."""
    lines = [f"# {title(found)}", ""]
    lines += [f"- {tables.plain(pair.sentence)}" for pair in found.pairs] or [_NOTHING, ""]
    lines += ["", *(tables.plain(note) for note in found.notes)]
    rows = [
        [one["group"].name, describe(one["group"].fields), str(len(one["values"])), *_numbers(one)]
        for one in summaries(found)
    ]
    lines += tables.markdown(_GROUPS, rows)
    if found.pairs:
        lines += [*tables.markdown(_PAIRS, [_cells(pair) for pair in found.pairs]), MODELLED]
    if found.left_out:
        lines += ["", "Not compared:", ""]
        lines += [f"- {tables.plain(f'{path}: {why}')}" for path, why in found.left_out.items()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def title(found: Comparison) -> str:
    """The metric, the split, and the numbers of runs and groups, in one line."""
    num = sum(len(group.runs) for group in found.groups)
    lower = ", lower is better" if found.metric in LOWER_IS_BETTER else ""
    return (
        f"{found.metric} on {found.split}{lower}: {num} run{'s' * (num != 1)} in "
        f"{len(found.groups)} group{'s' * (len(found.groups) != 1)}"
    )


def _numbers(row: dict[str, Any]) -> list[str]:
    mean = f"{row['mean']:.4f}"
    if len(row["values"]) < 2:
        return [mean, "–", "–"]
    return [mean, f"{row['spread']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"]


def _cells(pair: Pair) -> list[str]:
    name = f"{pair.a.name} - {pair.b.name}"
    if pair.difference is None:
        return [name, "–", "–", "–", "–", "–", pair.modelled]
    low, high = pair.difference.interval()
    by_seed = [f"{seed}: {_p(p)}" for seed, p in pair.mcnemar.items()]
    return [
        name, f"{pair.difference.value:+.4f}", f"{low:.4f} to {high:.4f}", _p(pair.difference.p),
        _p(pair.corrected), "; ".join(by_seed) or "–", pair.modelled,
    ]  # fmt: skip


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def to_csv(found: Comparison) -> dict[str, str]:
    """`runs.csv`, `groups.csv` and `pairs.csv`; numbers unrounded, unknown ones empty."""
    fields = list(found.groups[0].fields)
    runs = [["group", "seed", "value", "workdir"]]
    groups = [["group", *fields, "seeds", "mean", "spread", "low", "high"]]
    for row in summaries(found):
        group: Group = row["group"]
        for seed, i in zip(group.seeds, group.runs, strict=True):
            runs.append([group.name, seed, found.values[i], found.workdirs[i]])
        numbers = [row[name] for name in ("mean", "spread", "low", "high")]
        groups.append([group.name, *group.fields.values(), len(group.seeds), *numbers])
    pairs = [["a", "b", "difference", "low", "high", "p", "p_holm", "weighed", "sentence"]]
    for pair in found.pairs:
        one = pair.difference
        numbers = [one.value, *one.interval(), one.p, pair.corrected] if one else [np.nan] * 5
        pairs.append([pair.a.name, pair.b.name, *numbers, pair.modelled, pair.sentence])
    return {f"{name}.csv": tables.to_csv(rows) for name, rows in
            (("runs", runs), ("groups", groups), ("pairs", pairs))}  # fmt: skip


def to_html(found: Comparison) -> str:
    """The page, self-contained and without scripts."""
    rows = summaries(found)
    drawn = [pair for pair in found.pairs if pair.difference][:_MAX_DOTS]
    differences = [
        (f"{pair.a.name} - {pair.b.name}", [], pair.difference.value, *pair.difference.interval())
        for pair in drawn
    ]
    return environment().get_template("compare.html.jinja").render(
        title=title(found),
        found=found,
        nothing=_NOTHING,
        group_head=_GROUPS,
        pair_head=_PAIRS,
        group_rows=[
            (row["group"].name, describe(row["group"].fields), len(row["values"]), *_numbers(row))
            for row in rows
        ],
        run_rows=[
            (found.workdirs[i], group.name, seed, f"{found.values[i]:.4f}")
            for group in found.groups
            for seed, i in zip(group.seeds, group.runs, strict=True)
        ],
        cells=[_cells(pair) for pair in found.pairs],
        dots=Markup(figures.intervals("dots", _dots(rows), xlabel=_xlabel(found))),
        differences=Markup(
            figures.intervals("pairs", differences, zero=True,
                              xlabel=f"difference of {found.metric}, above 0: the first is better")
        ) if drawn else "",
        num_undrawn=len([pair for pair in found.pairs if pair.difference]) - len(drawn),
        curves=_curves(found),
        max_lines=_MAX_LINES,
        modelled=MODELLED,
        style=Markup(Path(__file__).with_name("report.css").read_text()),
    )  # fmt: skip


def to_png(found: Comparison) -> bytes:
    """The page's first picture: each run, and the mean of each group with its interval."""
    return figures.intervals_png(_dots(summaries(found)), xlabel=_xlabel(found))


def _dots(rows: Sequence[dict[str, Any]]) -> list[figures.Interval]:
    return [
        (textwrap.fill(visible(row["group"].label), 32, max_lines=2, placeholder=" …"),
         *(row[key] for key in ("values", "mean", "low", "high"))) for row in rows
    ]  # fmt: skip


def _xlabel(found: Comparison) -> str:
    return f"{found.metric} on {found.split}"


def _curves(found: Comparison) -> list[tuple[str, Markup]]:
    """(title, SVG) of metrics over steps; a group's line is the mean over its seeds."""
    sign = -1 if found.metric in LOWER_IS_BETTER else 1
    means = {g.name: sign * np.mean([found.values[i] for i in g.runs]) for g in found.groups}
    best = sorted(means, key=means.get, reverse=True)[:_MAX_LINES]
    names = {name for lines in found.histories for line in lines for name in line}
    names = sorted(
        (name for name in names if name.endswith(("/loss", "/accuracy"))),
        key=lambda name: (name != "train/loss", name),
    )
    drawn = []
    for name in names:
        series = {}
        for group in found.groups:
            points = _mean_curve([found.histories[i] for i in group.runs], name)
            if group.name in best and len(points) > 1:
                series[group.name] = tuple(points.T)
        if series:
            is_log = name.endswith("/loss") and all(y.min() > 0 for _, y in series.values())
            svg = figures.curves(
                f"curve{len(drawn)}", series, ylabel=shorten(visible(name), 40), log=is_log
            )
            drawn.append((name, Markup(svg)))
    return drawn[:_MAX_CURVES]


def _mean_curve(histories: Sequence[list[dict[str, Any]]], name: str) -> np.ndarray:
    """float64 (points, 2): the steps that all runs logged, and their mean values there."""
    by_step = [
        {line["step"]: line[name] for line in history if _is_finite(line.get(name))}
        for history in histories
    ]
    steps = sorted(set(by_step[0]).intersection(*by_step))
    return np.array([(step, np.mean([one[step] for one in by_step])) for step in steps])


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
