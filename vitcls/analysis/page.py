"""The report of one run as a self-contained HTML page.

The page shows the contents of a workdir as text only. Jinja escapes them, invisible characters are
removed, and the page's policy allows no script but its own, identified by its hash.
"""

import base64
import hashlib
import json
import math
import shlex
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from vitcls.analysis import classification, costs, figures, gallery, weighted
from vitcls.analysis.predictions import Predictions
from vitcls.analysis.run import Run, changed_fields
from vitcls.decision import kept
from vitcls.decision.rule import Rule, fit_temperature
from vitcls.errors import UserError

_HERE = Path(__file__).parent
_MAX_TABLE_CLASSES = 20  # of a confusion matrix that is a table
_MAX_PICTURE_CLASSES = 2000  # of a confusion matrix that is a picture
_MAX_ROWS = 2000  # of the table of classes
_MAX_PAIRS = 15
_MAX_NAME, _MAX_VALUE, _MAX_JSON = 80, 300, 100_000  # characters

# name -> (title, meaning)
_METRICS = {
    "accuracy": ("Accuracy", "share of images whose likeliest class is the label"),
    "top5_accuracy": ("Top-5 accuracy", "label among the five likeliest classes"),
    "balanced_accuracy": ("Balanced accuracy", "mean recall of the classes"),
    "macro_precision": ("Precision, macro", "mean over classes"),
    "macro_recall": ("Recall, macro", "mean over classes"),
    "macro_f1": ("F1, macro", "mean over classes"),
    "weighted_precision": ("Precision, weighted", "classes by their number of images"),
    "weighted_recall": ("Recall, weighted", "classes by their number of images"),
    "weighted_f1": ("F1, weighted", "classes by their number of images"),
    "micro_f1": ("F1, precision and recall, micro", "with one label per image, the accuracy"),
    "roc_auc": ("ROC-AUC", "each class against the rest, mean over classes"),
    "average_precision": ("Average precision", "each class against the rest, mean over classes"),
    "log_loss": ("Log-loss", "natural logarithm; lower is better"),
    "brier": ("Brier score", "summed over classes, 0 to 2; lower is better"),
    "ece": ("Calibration error", "confidence, bins of equal width; lower is better"),
    "ece_equal_mass": ("Calibration error, equal mass", "bins of equal size; lower is better"),
    "classwise_ece": ("Calibration error, class-wise", "mean over classes; lower is better"),
    "aurc": ("Risk-coverage area", "mistakes without the unsure images; lower is better"),
}


def render(
    run: Run,
    *,
    split: str = "",
    unknown: np.ndarray | None = None,
    unknown_logits: np.ndarray | None = None,
    explain: gallery.Explain | None = None,
) -> str:
    """Returns the page.

    Args:
      run: The run to report.
      split: The split to show in detail; empty: the first one.
      unknown: Confidence for images of unknown classes, float64 (M,).
      unknown_logits: Their logits, float32 (M, K), if they are known.
      explain: Makes the pictures of each image in the galleries; None: the image itself.

    Raises:
      UserError: The predictions for `split` are missing.
    """
    if split and split not in run.splits:
        known = ", ".join(run.splits) or "none"
        raise UserError(f"--split={split} has no readable predictions; these have: {known}.")
    split = split or next(iter(run.splits), "")
    context: dict[str, Any] = {
        "run": run,
        "name": run.workdir.absolute().name,
        "split": split,
        "metrics": _METRICS,
        "summaries": {name: classification.summarise(found) for name, found in run.splits.items()},
        "recipe": changed_fields(run.config),
        "command": _command(run.manifest),
        "commit": str(run.manifest.get("git_commit") or ""),
        "curves": _curves(run.history),
        "costs": costs.describe_costs(run),
        "resamples": classification.NUM_RESAMPLES,
        "bins": weighted.NUM_BINS,
        "script": Markup((_HERE / "report.js").read_text()),
        "style": Markup((_HERE / "report.css").read_text()),
    }
    context["script_hash"] = base64.b64encode(
        hashlib.sha256(context["script"].encode()).digest()
    ).decode()
    if split:
        context |= _details(run, run.splits[split], split, explain=explain)
        context |= _confidence(run, split, unknown, unknown_logits)
    context["augmented"], context["augmented_note"] = gallery.augmented_tiles(run)
    return environment().get_template("report.html.jinja").render(context)


def environment() -> jinja2.Environment:
    """Templates of this folder, with escaped values and the filters of this module."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=visible,
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "value": _value, "json": _json, "interval": _range}
    return environment


def visible(value: Any) -> Any:
    """Text without control characters, such as those that reverse the direction of writing."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() or c == "\n" else " " for c in value)


def shorten(text: str, max_chars: int = _MAX_NAME) -> str:
    """The text, cut to `max_chars` characters."""
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def _number(value: float, digits: int = 4) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _range(one: classification.Estimate) -> str:
    return "" if math.isnan(one.low) else f"{one.low:.4f} to {one.high:.4f}"


def _value(value: Any) -> str:
    """A field of a config or a manifest, on one line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return shorten(text or '""', _MAX_VALUE)


def _json(content: Any) -> str:
    return shorten(json.dumps(content, indent=2, default=str), _MAX_JSON)


def _command(manifest: dict[str, Any]) -> str:
    """The command of the run, without the path of Python on that machine."""
    parts = manifest.get("command")
    if not (isinstance(parts, list) and parts):
        return ""
    return shlex.join(["python", *map(str, parts[1:])])


def _curves(history: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """(title, SVG) of metrics over steps."""
    drawn = []
    for key, title, unit in (
        ("loss", "Loss", "loss"),
        ("accuracy", "Accuracy", "accuracy"),
        ("lr", "Learning rate", "learning rate"),
        ("images_per_second", "Speed", "images/s"),
    ):
        series = {}
        for full in dict.fromkeys(name for line in history for name in line):
            where, _, name = full.rpartition("/")
            points = [(line["step"], line[full]) for line in history if _is_finite(line.get(full))]
            if where and name == key and points:
                series[shorten(visible(where), 30)] = tuple(np.array(points, np.float64).T)
        if series:
            is_log = key == "loss" and all(values.min() > 0 for _, values in series.values())
            svg = figures.curves(f"curve-{key}", series, ylabel=unit, log=is_log)
            drawn.append((f"{title}: {', '.join(series)}", Markup(svg)))
    return drawn


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _details(
    run: Run, found: Predictions, split: str, *, explain: gallery.Explain | None
) -> dict[str, Any]:
    """The template's values for the classes and images of one split."""
    num_classes = found.logits.shape[1]
    names = [shorten(name) for name in run.class_names] or [f"{k}" for k in range(num_classes)]
    pairs = classification.confused_pairs(found)
    most_confused: dict[int, str] = {}
    for label, predicted, _ in pairs:
        most_confused.setdefault(label, names[predicted])
    table = classification.per_class(found)
    order = np.lexsort((-table["images"], np.nan_to_num(table["f1"], nan=2)))[:_MAX_ROWS]
    mistakes, unsure = gallery.worst_mistakes(found), gallery.least_certain(found)
    positions = np.concatenate([mistakes, unsure])
    images, note = gallery.open_images(run, split, found.ids[positions].tolist())
    pictures, maps_note = gallery.explain_images(found, positions, images, explain)
    tiles = gallery.make_tiles(found, positions, pictures, names)
    is_drawn = _MAX_TABLE_CLASSES < num_classes <= _MAX_PICTURE_CLASSES
    return {
        "num_images": len(found.labels),
        "num_right": int((found.logits.argmax(1) == found.labels).sum()),
        "surely_above": classification.surely_above(len(found.labels), len(found.labels)),
        "names": names,
        "confusion": (
            classification.confusion(found) if num_classes <= _MAX_TABLE_CLASSES else None
        ),
        "heat_map": figures.heat_map(classification.confusion(found)) if is_drawn else "",
        "pairs": [
            (names[label], names[predicted], num) for label, predicted, num in pairs[:_MAX_PAIRS]
        ],
        "num_pairs": len(pairs),
        "classes": [
            {"name": names[k], "confused": most_confused.get(k, "")}
            | {column: values[k].item() for column, values in table.items()}
            for k in order.tolist()
        ],
        "images_note": f"{note} {maps_note}".strip(),
        "mistakes": tiles[: len(mistakes)],
        "unsure": tiles[len(mistakes) :],
    }


def _confidence(
    run: Run, split: str, unknown: np.ndarray | None, unknown_logits: np.ndarray | None
) -> dict[str, Any]:
    """The template's values for how far the probabilities can be trusted."""
    found = run.splits[split]
    probabilities = found.probabilities
    is_wrong = probabilities.argmax(1) != found.labels
    once = np.ones((1, len(is_wrong)))
    coverage, risk = weighted.risk_coverage(is_wrong, probabilities.max(1), once)
    bins = classification.reliability(found)
    select = run.select_split
    shown: dict[str, Any] = {
        "reliability": Markup(figures.reliability("reliability", bins)),
        "reliability_bins": list(
            zip(bins["confidence"], bins["accuracy"], bins["images"], strict=True)
        ),
        "risk_coverage": Markup(figures.risk_coverage("risk", coverage[0], risk[0])),
        "answered": [
            (share, risk[0][np.searchsorted(coverage[0], share - 1e-9)])
            for share in (0.5, 0.8, 0.9, 0.95, 1.0)
        ],
        "is_scaled": select in run.splits and select != split,
        "unknown": None,
        "energy": None,
    }
    if shown["is_scaled"]:
        chosen = run.splits[select]
        shown["temperature"] = fit_temperature(chosen.labels, chosen.logits)
        if shown["temperature"] is not None:
            scaled = classification.at_temperature(found, shown["temperature"])
            shown["scaled"] = classification.summarise(scaled, num_resamples=0)
    shown |= _rejection(run, split)
    if unknown is not None:
        shown["unknown"] = classification.unknown_auroc(probabilities.max(1), unknown)
        shown["num_unknown"] = len(unknown)
    if unknown_logits is not None:
        known, others = (Rule(score="energy").scores(x) for x in (found.logits, unknown_logits))
        shown["energy"] = classification.unknown_auroc(known, others)
    return shown


def _rejection(run: Run, split: str) -> dict[str, Any]:
    """The template's values for what the run's rule promised, and keeps on one split."""
    if not run.decision:
        return {"decision": None}
    rule, found = kept.rule_of(run.decision), run.splits[split]
    measured = rule.measure(found.labels, found.logits) | {"split": split}
    return {
        "decision": run.decision,
        "promised": kept.describe(run.decision),
        "kept": kept.describe(measured) if split != run.decision["split"] else "",
    }
