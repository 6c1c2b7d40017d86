"""The rule of a finished run, from the predictions that it left."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vitcls.analysis import predictions
from vitcls.decision import kept
from vitcls.decision import unknown as unknown_images
from vitcls.errors import UserError
from vitcls.files import read_json, write_json
from vitcls.folders.workdir import Workdir


def decide(
    directories: Sequence[str], *, targets: dict[str, float], unknown: str = ""
) -> Iterator[str]:
    """Writes `decision.json` of each run and yields a line about it, once all can be read.

    Args:
      directories: Workdirs of finished runs.
      targets: See `kept.decide`.
      unknown: Path of logits for images of none of the classes; "": there are none.

    Raises:
      UserError: a run is not finished or has no hold-out, or a file is damaged.
    """
    logits = predictions.read_logits(Path(unknown)) if unknown else None
    runs = [(workdir, _read_origin(workdir)) for workdir in map(Workdir, directories)]
    for workdir, origin in runs:
        found = predictions.read_predictions(workdir.path, origin["split"])
        content = unknown_images.decide(
            found.labels, found.logits, logits, origin=origin, targets=targets
        )
        write_json(workdir.decision, content)
        yield f"{kept.describe(content)} -> {workdir.decision}"


def _read_origin(workdir: Workdir) -> dict[str, Any]:
    """Whose predictions the folder has for the hold-out."""
    remedy = "name the workdir of a finished run, or run its command again to finish it"
    results = read_json(workdir.results, remedy=remedy)
    evaluation = read_json(workdir.config, remedy=remedy).get("eval", {})
    if "selected_step" not in results or not workdir.model.is_dir():
        raise UserError(f"{workdir.path} is not the workdir of a finished run: {remedy}.")
    if not evaluation.get("select_split"):
        raise UserError(
            f"{workdir.path} has no hold-out: its eval.select_split is empty. A threshold that is "
            "chosen on a measured split would promise too much; train with "
            "--config.eval.select_split=holdout."
        )
    return {
        "step": results["selected_step"],
        "split": evaluation["select_split"],
        "tta": evaluation.get("tta", "none"),
    }
