"""Figures of the pages: SVG in the page's colours, or images as data URIs.

Matplotlib escapes the text of a figure, and reads none of it as mathematics.
"""

import base64
import functools
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager, ticker
from matplotlib.figure import Figure
from PIL import Image

from vitcls.analysis.classification import Estimate
from vitcls.check_data import fonts

# Drawn in this colour, which SVG then replaces with the page's text colour.
_INK = "#010203"
# Those of Okabe and Ito's colours that stand out on white and on black.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a07800", "#56b4e9")
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "vitcls", "text.parse_math": False,
    "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2, "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=_COLORS), "path.simplify_threshold": 0.5,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
     "ytick.color", "grid.color"), _INK,
)  # fmt: skip
_MAX_POINTS = 400  # of a curve
_MARGIN = 1.5  # factor by which an axis of costs exceeds the costs at both ends


def _style(texts: Iterable[str]) -> dict[str, Any]:
    """The style of a figure, with fonts for those of its texts that matplotlib's own font lacks."""
    own = Path(font_manager.findfont(font_manager.FontProperties()))
    wanted = fonts.visible_characters("".join(texts))
    files, missing = fonts.files_for({c for c in wanted if not fonts.has(own, c)})
    fonts.warn_missing(missing)
    return _STYLE | {"font.family": ["sans-serif", *map(_add_font, files)]}


@functools.cache
def _add_font(path: Path) -> str:
    """Makes a font file known to matplotlib; returns its family."""
    font_manager.fontManager.addfont(path)
    return font_manager.get_font(path).family_name


def _save(figure: Figure, file: io.IOBase, **options: Any) -> None:
    with warnings.catch_warnings():
        # `fonts.warn_missing` has said so already, and what to do.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, **options)


def _figure(width: float = 4.4, height: float = 3.0, rows: Sequence[int] = (1,)):
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(
        len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows}
    )
    return figure, axes[:, 0]


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of an HTML page, with ids that are unique in the page."""
    file = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _save(figure, file, format="svg", transparent=True, metadata=unsaid)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    # The caption describes the figure, so that screen readers skip the drawing.
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>',
                  r'<svg \1 aria-hidden="true" xmlns="http://www.w3.org/2000/svg" '
                  r'xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)  # fmt: skip


class _PlainNumbers(ticker.LogFormatter):
    """Plain numbers at matplotlib's ticks: its own format is mathematics, which is off."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def _scale_log(axes, which: str = "y") -> None:
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axis.set_major_formatter(_PlainNumbers())
    axis.set_minor_formatter(_PlainNumbers(minor_thresholds=(2, 0.6)))


def curves(
    name: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]], *, ylabel: str, log: bool
) -> str:
    """SVG of values over steps, one line each; short series also show their points."""
    with matplotlib.rc_context(_style([*series, ylabel])):
        figure, (axes,) = _figure()
        for label, (steps, values) in series.items():
            kept = np.unique(np.linspace(0, len(steps) - 1, _MAX_POINTS).astype(int))
            marker = "o" if len(steps) < 12 else None
            axes.plot(steps[kept], values[kept], marker=marker, markersize=3, label=label)
        if log:
            _scale_log(axes)
        axes.set(xlabel="step", ylabel=ylabel)
        if len(series) > 1:
            axes.legend()
        return _svg(figure, name)


def reliability(name: str, bins: Mapping[str, np.ndarray]) -> str:
    """SVG of accuracy and number of images by confidence, see `classification.reliability`."""
    with matplotlib.rc_context(_STYLE):
        figure, (above, below) = _figure(4.4, 4.0, rows=(3, 1))
        above.plot([0, 1], [0, 1], color=_INK, linestyle=":", linewidth=1, label="calibrated")
        above.vlines(bins["confidence"], bins["confidence"], bins["accuracy"], color=_COLORS[1])
        above.plot(bins["confidence"], bins["accuracy"], "o-", markersize=4, label="measured")
        above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        above.legend(loc="upper left")
        below.bar(bins["confidence"], bins["images"], width=0.04, color=_COLORS[0])
        below.set(xlabel="confidence", ylabel="images")
        _scale_log(below)
        return _svg(figure, name)


def risk_coverage(name: str, coverage: np.ndarray, risk: np.ndarray) -> str:
    """SVG of the share of mistakes among the answered images."""
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _figure()
        kept = np.unique(np.linspace(0, len(risk) - 1, _MAX_POINTS).astype(int))
        axes.plot(100 * coverage[kept], 100 * risk[kept])
        axes.set(xlabel="answered, % of images", ylabel="mistakes among them, %")
        axes.set(xlim=(0, 100), ylim=(0, max(1.0, 110 * risk.max())))
        return _svg(figure, name)


# (label, single values, mean, low, high); low and high are NaN without an interval.
Interval = tuple[str, Sequence[float], float, float, float]


def intervals(name: str, rows: Sequence[Interval], *, xlabel: str, zero: bool = False) -> str:
    """SVG with a line per row, from the top: single values as rings, the mean with its interval.

    Args:
      name: Name of the figure in the page.
      rows: See `Interval`.
      xlabel: Name of the values.
      zero: Whether to mark 0.
    """
    with matplotlib.rc_context(_style([xlabel, *(row[0] for row in rows)])):
        return _svg(_draw_intervals(rows, xlabel=xlabel, zero=zero), name)


def intervals_png(rows: Sequence[Interval], *, xlabel: str) -> bytes:
    """The same as a PNG file, black on white, for pages other than HTML."""
    file = io.BytesIO()
    with matplotlib.rc_context(_style([xlabel, *(row[0] for row in rows)])):
        figure = _draw_intervals(rows, xlabel=xlabel, zero=False)
        _save(figure, file, format="png", dpi=150)
    return file.getvalue()


def _draw_intervals(rows: Sequence[Interval], *, xlabel: str, zero: bool) -> Figure:
    figure, (axes,) = _figure(6.0, 0.9 + 0.36 * len(rows))
    for i, (_, values, mean, low, high) in enumerate(rows):
        axes.plot(values, [i] * len(values), "o", markersize=4, fillstyle="none", alpha=0.7,
                  color=_COLORS[0])  # fmt: skip
        axes.plot([low, high], [i, i], color=_COLORS[1], linewidth=1.5)
        axes.plot([mean], [i], "o", markersize=5, color=_COLORS[1])
    if zero:
        axes.axvline(0, color=_INK, linestyle=":", linewidth=1)
    axes.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    return figure


def accuracy_against_cost(
    rows: Sequence[tuple[str, float, Estimate, bool]], *, xlabel: str, ylabel: str
) -> dict[str, bytes]:
    """A picture of candidates as dots with intervals, as the contents of "png" and "svg" files.

    Args:
      rows: (label, cost, accuracy, whether it is worse than the choice); the choice comes first.
        A candidate of unknown cost (infinite) is listed but not drawn.
      xlabel: Name of the costs; their axis is logarithmic.
      ylabel: Name of the accuracies.
    """
    with matplotlib.rc_context(_style([xlabel, ylabel, *(row[0] for row in rows)])):
        figure, (axes,) = _figure(6.4, 3.6 + 0.19 * len(rows))
        styles = {
            "the choice": dict(color=_COLORS[1], marker="D"),
            "cannot be told apart from it": dict(color=_COLORS[0], marker="o"),
            "worse": dict(color=_COLORS[0], marker="o", markerfacecolor="white", alpha=0.6),
        }
        names = list(styles)
        lines = []
        for i, x in enumerate(_side_by_side([row[1] for row in rows])):
            label, _, accuracy, is_worse = rows[i]
            lines.append(f"{i + 1}  {label}")
            if math.isinf(x):
                continue
            ends = [[accuracy.value - accuracy.low], [accuracy.high - accuracy.value]]
            style = styles[names[(2 if is_worse else 1) if i else 0]]
            axes.errorbar([x], [accuracy.value], yerr=ends, capsize=2, linewidth=1, **style)
            axes.annotate(f"{i + 1}", (x, accuracy.value), (5, 4), textcoords="offset points")
        for name, style in styles.items():
            axes.plot([], [], linestyle="", label=name, **style)
        known = [row[1] for row in rows if math.isfinite(row[1])]
        if known:
            axes.set(xlim=(min(known) / _MARGIN, max(known) * _MARGIN))
        _scale_log(axes, "x")
        note = " (side by side where equal)" if len(set(known)) < len(known) else ""
        axes.set(xlabel=xlabel + note, ylabel=ylabel)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(styles))
        figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=8, linespacing=1.3)
        return {suffix: _file(figure, suffix) for suffix in ("png", "svg")}


def _side_by_side(costs: Sequence[float]) -> list[float]:
    """The costs, with equal ones moved slightly apart on a logarithmic axis."""
    known = [cost for cost in costs if math.isfinite(cost)] or [1.0]
    span = math.log(max(known) / min(known)) + 2 * math.log(_MARGIN)
    moved = []
    for i, cost in enumerate(costs):
        same = [j for j, other in enumerate(costs) if other == cost]
        place = same.index(i) - (len(same) - 1) / 2
        moved.append(cost * math.exp(place * min(0.02, 0.3 / len(same)) * span))
    return moved


def _file(figure: Figure, suffix: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if suffix == "svg" else {}
    _save(figure, file, format=suffix, dpi=150, metadata=metadata)
    return file.getvalue()


def heat_map(matrix: np.ndarray) -> str:
    """Data URI of a confusion matrix, rows as shares of their sum: white is 0, black is 1."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = len(matrix)
    # Rare mistakes should be visible: the root turns a share of 1 % into 10 % of black.
    grey = (255 * (1 - np.sqrt(shares))).round().astype(np.uint8)
    scale = max(1, round(600 / side))
    return data_uri(Image.fromarray(grey).resize((side * scale,) * 2, Image.Resampling.NEAREST))


def data_uri(image: Image.Image, *, size: int | None = None) -> str:
    """Encodes an image anew, so that the page gets its pixels and no metadata.

    Args:
      image: An image in a mode that PNG and JPEG have.
      size: Limit of the longer side, in pixels; smaller images stay as they are.
    """
    if size and max(image.size) > size:
        scale = size / max(image.size)
        image = image.resize(
            [max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS
        )
    # JPEG would blur the few pixels of a tiny image without making it smaller.
    is_photo = image.mode == "RGB" and max(image.size) > 64
    file = io.BytesIO()
    image.save(file, **(dict(format="JPEG", quality=82) if is_photo else dict(format="PNG")))
    kind = "jpeg" if is_photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
