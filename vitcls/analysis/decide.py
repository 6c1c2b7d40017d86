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

from absl import flags

from vitcls import cli
from vitcls.errors import UserError

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
    from vitcls.analysis import deciding  # imports jax, so it follows the checks of the flags

    for line in deciding.decide(directories, targets=targets, unknown=_UNKNOWN.value):
        print(line)


if __name__ == "__main__":
    cli.run(main, arguments="DIR")
