r"""Plots the gain of pretraining against the number of training images, from a finished sweep.

    python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/few_shot.py \
      --workdir=runs/few_shot --config.eval.select_split= --config.train.total_epochs=0 \
      --config.train.global_batch_size=32
    python -m benchmarks.few_shot --sweep=runs/few_shot --output=docs/few_shot.png

Prints a Markdown table: mean, lowest and highest test accuracy over the seeds, and the difference
between pretrained and random weights in points, with its 95 % interval (paired t over the seeds).
Needs matplotlib and scipy.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from vitcls.files import expand

INITS = {"init=pretrained": "pretrained", "init=scratch": "from scratch"}
ALL = 0  # data.per_class for all images
ALL_IMAGES = 143.7  # per class, on average: 1 437 training images of ten digits

# (images per class, init) -> seed -> test accuracy
Accuracies = dict[tuple[int, str], dict[int, float]]


def read(folder: Path) -> Accuracies:
    """Returns the test accuracies of the finished trials of the sweep in `folder`."""
    found: Accuracies = defaultdict(dict)
    for trial in json.loads((folder / "sweep.json").read_text())["trials"]:
        fields = trial["fields"]
        if trial["metrics"]:
            key = fields["data.per_class"], fields["config"]
            found[key][fields["train.seed"]] = trial["metrics"]["test/accuracy"]
    return found


def table(found: Accuracies) -> str:
    """Returns the accuracies as a Markdown table, few images first."""
    lines = [
        "| images per class | seeds | pretrained | from scratch | difference |",
        "|---|---|---|---|---|",
    ]
    for per_class in sorted({size for size, _ in found}, key=_images):
        sides = [found[per_class, init] for init in INITS]
        seeds = sorted(set(sides[0]) & set(sides[1]))
        spreads = [_spread([side[seed] for seed in seeds]) for side in sides]
        gains = _interval([100 * (sides[0][seed] - sides[1][seed]) for seed in seeds])
        cells = [str(per_class or "all"), str(len(seeds)), *spreads, gains]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _images(per_class: int) -> float:
    return ALL_IMAGES if per_class == ALL else per_class


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _interval(values: list[float]) -> str:
    from scipy import stats  # takes a second to import

    mean = statistics.fmean(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    return f"{mean:.1f} ({mean - reach:.1f} to {mean + reach:.1f})"


def draw(found: Accuracies, path: Path) -> None:
    """Writes the curves: the mean, the range over the seeds, a dot for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    for (init, label), color, marker in zip(INITS.items(), ("C0", "C1"), "os", strict=True):
        sizes = sorted((size for size, which in found if which == init), key=_images)
        values = [list(found[size, init].values()) for size in sizes]
        x = [_images(size) for size in sizes]
        axes.plot(x, [statistics.fmean(v) for v in values], color=color, marker=marker, label=label)
        axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2)
        for position, accuracies in zip(x, values, strict=True):
            axes.plot([position] * len(accuracies), accuracies, ".", color=color, markersize=4)
    _label(axes, sorted({_images(size) for size, _ in found}))
    figure.savefig(path)


def _label(axes: Any, sizes: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"all ({x:.0f})" if x == ALL_IMAGES else f"{x:.0f}" for x in sizes])
    axes.minorticks_off()
    axes.set(
        xlabel="training images per class",
        ylabel="test accuracy",
        ylim=(0, 1),
        title="Digits: mean and range over the seeds",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def main() -> None:
    """Reads the command line, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", type=expand, required=True, help="folder of the finished sweep")
    parser.add_argument("--output", type=expand, required=True, help="picture to write, a .png")
    args = parser.parse_args()
    if not (args.sweep / "sweep.json").is_file():
        parser.error(f"--sweep={args.sweep} has no sweep.json: run launch.sweep first.")
    found = read(args.sweep)
    print(table(found))
    draw(found, args.output)


if __name__ == "__main__":
    main()
