"""Writes a selection as Markdown, CSV and a picture."""

import math
import re

from vitcls.analysis import classification, figures, tables
from vitcls.analysis.classification import Estimate
from vitcls.analysis.page import visible
from vitcls.analysis.selection import Row, Selection, sentence

# Longer labels lose their beginning: the end of a path says more.
_MAX_LABEL = 70
_HEAD = (
    "", "candidate", "linear probe", "nearest neighbours", "behind the choice, points", "p, Holm",
    "parameters, M", "GFLOPs", "images/s", "pixels",
)  # fmt: skip
_FIELDS = (
    "rank", "candidate", "probe", "probe_low", "probe_high", "knn", "knn_low", "knn_high", "behind",
    "behind_low", "behind_high", "p_holm", "is_worse", "lr", "weight_decay", "k", "parameters",
    "gflops", "images_per_second", "batch_size", "height", "width", "left_out",
)  # fmt: skip


def to_markdown(found: Selection) -> str:
    """The selection as it is printed."""
    lines = [
        "# Which checkpoint to take", "", tables.plain(sentence(found)),
        *tables.markdown(_HEAD, [_cells(i, row) for i, row in enumerate(found.rows, 1)]),
        f"Accuracies are on {found.num_images} held-out images, with heads fitted on "
        f"{found.num_train}; the linear probe's is the mean of "
        f"{found.rows[0].candidate.num_seeds} seeds. In brackets: 95 % intervals over "
        f"{classification.NUM_RESAMPLES} resamples of the held-out images. p is from a test "
        "that is paired by image, and corrected for the number of candidates. Parameters exclude "
        "the head. GFLOPs (a multiply-add is two) are those of one image's forward pass. images/s "
        "is the speed of the forward pass on this machine, without decoding.",
    ]  # fmt: skip
    if found.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- {tables.plain(f'{name}: {why}')}" for name, why in found.left_out.items()]
    return "\n".join(lines) + "\n"


def _cells(rank: int, row: Row) -> list[str]:
    costs, behind = row.candidate.costs, row.behind
    is_choice = math.isnan(row.p)
    return [
        str(rank), row.candidate.name, _interval(row.probe), _interval(row.knn),
        "–" if is_choice else
        f"{100 * behind.value:.1f} ({_points(behind.low)} to {_points(behind.high)})",
        "–" if is_choice else f"{row.p:.3f}" if row.p >= 0.001 else f"{row.p:.1e}",
        _number(costs.num_params / 1e6), _number(costs.gflops), _number(costs.images_per_second),
        "{} x {}".format(*costs.image_size),
    ]  # fmt: skip


def _number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    if math.isinf(value):
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0:.1f}"  # adding 0 turns -0.0 into 0.0


def _interval(one: Estimate) -> str:
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def to_csv(found: Selection) -> str:
    """A row for each candidate; numbers unrounded."""
    lines = [list(_FIELDS)]
    for rank, row in enumerate(found.rows, 1):
        one, costs = row.candidate, row.candidate.costs
        estimates = [
            number
            for estimate in (row.probe, row.knn, row.behind)
            for number in (estimate.value, estimate.low, estimate.high)
        ]
        lines.append([
            rank, one.name, *estimates, row.p, row.is_worse, one.chosen["lr"],
            one.chosen["weight_decay"], one.chosen["k"], costs.num_params, costs.gflops,
            costs.images_per_second, costs.batch_size, *costs.image_size, "",
        ])  # fmt: skip
    for name, why in found.left_out.items():
        lines.append(["", name, *[""] * (len(_FIELDS) - 3), why])
    return tables.to_csv(lines)


def to_pictures(found: Selection) -> dict[str, bytes]:
    """Pictures of accuracy against cost, by file suffix."""
    return figures.accuracy_against_cost(
        [
            (_label(row.candidate.name), row.candidate.costs.gflops, row.probe, row.is_worse)
            for row in found.rows
        ],
        xlabel="GFLOPs for an image",
        ylabel=f"linear probe's accuracy on {found.num_images} images",
    )


def _label(name: str) -> str:
    name = re.sub(r"\s+", " ", visible(name))
    return name if len(name) <= _MAX_LABEL else "…" + name[1 - _MAX_LABEL :]
