"""Writes a report of each run: one self-contained HTML page.

  python -m vitcls.analysis.report runs/quickstart

writes runs/quickstart/report.html: metrics with 95 % intervals, recipe and command, learning
curves, confusion matrix, classes, calibration, mistakes and least certain images with maps of where
the network looked, augmented training images, speed, manifest. The page of a run that was killed
shows what the run had written.

DIR is the workdir of a run, or the --output folder of vitcls.evaluate. Needs
pip install -r requirements-analysis.txt.
"""

import functools
from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import written_aside
from vitcls.folders import ownership

_OUTPUT = flags.DEFINE(
    cli.PATH, "output", "", "The page, of one DIR; empty: report.html in every DIR."
)
_SPLIT = flags.DEFINE_string(
    "split", "", "Split that the details are of; empty: the first of data.eval_splits."
)
_UNKNOWN = flags.DEFINE(
    cli.PATH, "unknown", "",
    "Predictions for images of none of the classes, CSV or npz of vitcls.predict: how well "
    "confidence, and with npz the energy, tells them apart; empty: it is not measured.",
)  # fmt: skip
_EXPLAIN = flags.DEFINE_bool(
    "explain", True, "Maps of where the network looked, next to the images; needs the checkpoint."
)


def main(directories: list[str]) -> None:
    """Checks the flags, then writes the pages."""
    if _OUTPUT.value and len(directories) > 1:
        raise UserError(
            f"--output={_OUTPUT.value} is one page, but there are {len(directories)} folders; "
            "omit --output, or name one folder."
        )
    workdirs = [Path(directory) for directory in directories]
    for workdir in workdirs:
        if not workdir.is_dir():
            raise UserError(f"{workdir} is not a folder; name the workdir of a run.")
    output = Path(_OUTPUT.value or workdirs[0] / "report.html")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--output={output} is a folder, or in a missing folder; name a file.")
    outputs = [Path(_OUTPUT.value or workdir / "report.html") for workdir in workdirs]
    for output in outputs:
        own = functools.partial(ownership.has_text, output, "vitcls report</title>")
        ownership.check_file("--output", output, is_own=own)
    # These import much, which takes seconds: a wrong flag should fail before.
    try:
        from vitcls.analysis import explaining, page, predictions, run
    except ModuleNotFoundError as error:
        raise UserError(
            f"Reports need {error.name}: pip install -r requirements-analysis.txt"
        ) from error

    unknown = predictions.read_confidence(Path(_UNKNOWN.value)) if _UNKNOWN.value else None
    has_logits = _UNKNOWN.value.endswith(".npz")
    logits = predictions.read_logits(Path(_UNKNOWN.value)) if has_logits else None
    for workdir, output in zip(workdirs, outputs, strict=True):
        text = page.render(
            run.read_run(workdir),
            split=_SPLIT.value,
            unknown=unknown,
            unknown_logits=logits,
            explain=explaining.for_gallery(workdir) if _EXPLAIN.value else None,
        )
        with written_aside(output) as aside:
            aside.write_text(text, encoding="utf-8")
        print(f"{workdir}: {len(text.encode()) / 1e6:.1f} MB -> {output}")


if __name__ == "__main__":
    cli.run(main, arguments="DIR")
