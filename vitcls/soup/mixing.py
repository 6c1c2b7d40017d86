"""Makes soups: reads checkpoints, chooses, averages, and writes the result with a record."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitcls import inference, pretrained
from vitcls.data.skipped import Skipped
from vitcls.data.sources.split import Split
from vitcls.errors import NotFinite, UserError
from vitcls.evaluate import exact
from vitcls.evaluate.summary import best_name, select_score
from vitcls.files import folder_aside, write_json
from vitcls.logs import parameters, progress
from vitcls.processes.devices import start_devices
from vitcls.provenance import manifest
from vitcls.provenance.results import count_images
from vitcls.soup import ingredients, means
from vitcls.step import sharding

log = logging.getLogger("vitcls")

PyTree = Any
Evaluate = Callable[[str, PyTree], means.Metrics]

# Points of WiSE-FT, from the pretrained weights to the fine-tuned ones.
ALPHAS = tuple(tenths / 10 for tenths in range(11))


def make(
    checkpoints: str,
    *,
    how: str,
    output: str | Path,
    start: str = "",
    alpha: float | None = None,
    metric: str = "accuracy",
    on_error: str = "raise",
    labels: str = "name",
    batch_size: int = 0,
    **selection: Any,
) -> dict[str, Any]:
    """Makes a soup; the folder appears when it is complete.

    Args:
      checkpoints: See `ingredients.find`.
      how: "uniform", "greedy", or "wise" for WiSE-FT.
      output: The folder to make, new or empty.
      start: The pretrained checkpoint for "wise", see `ingredients.read_start`.
      alpha: The point on the line for "wise"; None: the best of ALPHAS.
      metric: Name of the metric that chooses, in `config.SELECT_METRICS`.
      on_error: For images that cannot be decoded: "raise", or "skip" and list them in the folder.
      labels: See `classes.match`.
      batch_size: See `inference.compile_step`.
      **selection: See `ingredients.open_selection`.

    Returns:
      The content of `soup.json`.

    Raises:
      UserError: Checkpoints or images are missing, or do not fit together.
    """
    with folder_aside(output) as aside, tempfile.TemporaryDirectory() as scratch:
        found = {one.name: one for one in ingredients.find(checkpoints)}
        first, digests = next(iter(found.values())), {}
        if how == "wise" and len(found) > 1:
            raise UserError(
                f"--how=wise takes one checkpoint, and --checkpoints={checkpoints} names "
                f"{len(found)}; make a soup of them first, then use --how=wise on the soup."
            )

        def read(name: str) -> PyTree:
            weights = found[name].read()
            digests[name] = parameters.sha256(weights)
            return weights

        evaluate, chosen_on, listed = None, None, Path(scratch) / "skipped.jsonl"
        if how == "greedy" or (how == "wise" and alpha is None):
            source, split = ingredients.open_selection(found.values(), **selection)
            chosen_on = {"data": source, "split": split.name, "num_examples": len(split)}
            chosen_on |= {"fingerprint": split.fingerprint, "metric": metric} | split.origin()
            skipped = Skipped(listed) if on_error == "skip" else None
            evaluate = _make_evaluate(
                first.location, split, labels=labels, batch_size=batch_size, skipped=skipped
            )
        if how == "uniform":
            weights = means.average(map(read, progress.track(found, "checkpoints")))
            made = {"used": list(found), "metrics": None}
        elif how == "greedy":
            weights, made = _greedy(list(found), read, evaluate, metric)
        else:
            end = read(first.name)
            begin, origin = ingredients.read_start(first, end, checkpoint=start)
            alphas = ALPHAS if alpha is None else (alpha,)
            weights, made = _wise(begin, end, evaluate, metric, alphas=alphas)
            made |= {
                "used": [first.name],
                "pretrained": origin | {"sha256": parameters.sha256(begin)},
            }
        record = {
            "how": how,
            "checkpoints": [
                {"checkpoint": name, "step": one.step, "sha256": digests[name]}
                for name, one in found.items()
            ],
            "selection": chosen_on,
            **made,
            "sha256": parameters.sha256(weights),
            "environment": manifest.environment(sharding.make_mesh(-1, 1, devices=start_devices())),
        }
        if "batch_stats" in weights and record["sha256"] not in digests.values():
            log.warning(
                "The running statistics of BatchNorm are averaged like weights, and differ from "
                "those that this network would measure: compare it with a single checkpoint before "
                "you use it."
            )
        pretrained.save(aside, pretrained.make_model(first.network), weights, first.processor)
        write_json(aside / "soup.json", record)
        if listed.exists():
            shutil.move(listed, aside)
    return record


def _make_evaluate(checkpoint: str | Path, split: Split, **options: Any) -> Evaluate:
    """Compiles one program, which evaluates any weights of the network of `checkpoint`."""
    model, variables, processor, mesh = inference.load_classifier(checkpoint)
    evaluator = exact.make_evaluator(model, variables, processor, split, mesh=mesh, **options)

    def evaluate(what: str, weights: PyTree) -> means.Metrics:
        try:
            metrics, _ = evaluator(weights)
        except NotFinite as error:
            raise NotFinite(f"{what}: {error}") from error
        log.info(
            "%s: %s accuracy %.4f, loss %.4f (%s)",
            what, split.name, metrics["accuracy"], metrics["loss"], count_images(metrics),
        )  # fmt: skip
        return metrics

    return evaluate


def _greedy(
    names: Sequence[str], read: Callable[[str], PyTree], evaluate: Evaluate, metric: str
) -> tuple[PyTree, dict[str, Any]]:
    soup = means.greedy(names, read, evaluate, score=lambda found: select_score(found, metric))
    best_name(soup.alone, metric)  # raises an error if no score is finite
    kept = [addition for addition in soup.additions if addition.is_kept]
    return soup.weights, {
        "used": [addition.name for addition in kept],
        "alone": soup.alone,
        "additions": [addition._asdict() for addition in soup.additions],
        "metrics": kept[-1].metrics,
    }


def _wise(
    begin: PyTree, end: PyTree, evaluate: Evaluate | None, metric: str, *, alphas: Sequence[float]
) -> tuple[PyTree, dict[str, Any]]:
    """The given point, or the best of several; ties go to the lowest loss."""
    if evaluate is None:
        (alpha,) = alphas
        return means.interpolate(begin, end, alpha), {"alpha": alpha, "metrics": None}
    found = {
        alpha: evaluate(f"alpha {alpha}", means.interpolate(begin, end, alpha)) for alpha in alphas
    }
    best = best_name(found, metric)
    return means.interpolate(begin, end, best), {
        "alpha": best,
        "alphas": [{"alpha": alpha, "metrics": metrics} for alpha, metrics in found.items()],
        "metrics": found[best],
    }


def describe(record: dict[str, Any]) -> str:
    """Returns `2 of 3 checkpoints, holdout accuracy 0.9861 (144 images)`, for example."""
    line = f"{len(record['used'])} of {len(record['checkpoints'])} checkpoints"
    if record["how"] == "wise":
        line = f"alpha {record['alpha']}"
    if record["metrics"] is None:
        return line
    split, metrics = record["selection"]["split"], record["metrics"]
    return f"{line}, {split} accuracy {metrics['accuracy']:.4f} ({count_images(metrics)})"
