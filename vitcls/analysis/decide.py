"""Chooses when the network of a finished run answers, and keeps that with its checkpoint.

  python -m vitcls.analysis.decide runs/mine --target_precision=0.95
  python -m vitcls.analysis.decide runs/mine --target_coverage=0.9 --unknown=unknown.npz

reads the predictions for the hold-out and writes runs/mine/model/decision.json, which --reject of
vitcls.predict and vitcls.evaluate applies. No network runs. A run with eval.target_precision or
eval.target_coverage ends with the same file. docs/decision.md says how the threshold is chosen.

--unknown names what vitcls.predict --output=unknown.npz wrote for images of none of the classes.
The score that tells them from the hold-out better is kept: the largest probability or the energy.

DIR is the workdir of a finished run.
"""

from pathlib import Path
from typing import Any

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import read_json, write_json
from vitcls.folders.workdir import Workdir

_PRECISION = flags.DEFINE_float(
    "target_precision", 0.0, "Share of the answers that should be right, below 1.", 0, 1
)
_COVERAGE = flags.DEFINE_float(
    "target_coverage", 0.0, "Share of the images to answer, below 1; instead of a precision.", 0, 1
)
_UNKNOWN = flags.DEFINE(
    cli.PATH, "unknown", "",
    "Predictions for images of none of the classes, npz of vitcls.predict; empty: the score is the "
    "largest probability.",
)  # fmt: skip


def main(directories: list[str]) -> None:
    """Checks the flags, then chooses for each run."""
    targets = {flag.name: flag.value for flag in (_PRECISION, _COVERAGE) if flag.value}
    if len(targets) != 1 or 1 in targets.values():
        raise UserError(
            "Give exactly one of --target_precision and --target_coverage, above 0 and below 1: "
            "--target_precision=0.95."
        )
    runs = [_read(Workdir(directory)) for directory in directories]
    # These import jax, so they follow the checks of the flags.
    from vitcls.analysis import predictions
    from vitcls.decision import kept, unknown

    logits = predictions.read_logits(Path(_UNKNOWN.value)) if _UNKNOWN.value else None
    for workdir, origin in runs:
        found = predictions.read_predictions(workdir.path, origin["split"])
        content = unknown.decide(
            found.labels, found.logits, logits, origin=origin, targets=targets
        )  # fmt: skip
        write_json(workdir.decision, content)
        print(f"{kept.describe(content)} -> {workdir.decision}")


def _read(workdir: Workdir) -> tuple[Workdir, dict[str, Any]]:
    """The folder, and whose predictions it has for the hold-out."""
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
    return workdir, {
        "step": results["selected_step"],
        "split": evaluation["select_split"],
        "tta": evaluation.get("tta", "none"),
    }


if __name__ == "__main__":
    cli.run(main, arguments="DIR")
