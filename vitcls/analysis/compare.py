"""Compares runs: which group is better, by how much, and how certain that is.

  python -m vitcls.analysis.compare runs/sweep --output=runs/comparison

Each DIR is the workdir of a run, or a folder of workdirs such as launch.sweep makes. Runs whose
configs differ in nothing but the seed form a group. A group gets mean, spread and 95 % interval
over seeds. A pair of groups gets a sentence, from tests that are paired by image and corrected for
the number of pairs. Unfinished runs are listed and left out.

The comparison is printed as Markdown. With --output the folder gets comparison.md, comparison.html
with pictures, groups.png (the first picture), groups.csv, pairs.csv and runs.csv. Needs
pip install -r requirements-analysis.txt.
"""

from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import make_folder, written_aside
from vitcls.folders import ownership
from vitcls.folders.ownership import has_text

_SPLIT = flags.DEFINE_string("split", "test", "Split whose images are compared.")
_METRIC = flags.DEFINE_enum(
    "metric", "accuracy",
    ["accuracy", "top5_accuracy", "balanced_accuracy", "macro_precision", "macro_recall",
     "macro_f1", "log_loss", "brier"],
    "What is compared, computed from predictions/SPLIT.npz: accuracy, top5_accuracy, "
    "balanced_accuracy, macro_precision, macro_recall, macro_f1, log_loss or brier.",
)  # fmt: skip
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", "",
    "Folder for the files, where those of an earlier comparison are replaced; empty: none is "
    "written.",
)  # fmt: skip


# The first one tells a comparison's folder from another folder.
_FILES = (
    "comparison.html", "comparison.md", "groups.csv", "pairs.csv", "runs.csv", "groups.png",
)  # fmt: skip


def main(directories: list[str]) -> None:
    """Checks the flags, compares, prints and writes."""
    split = cli.required(_SPLIT)
    try:
        from vitcls.analysis import comparison, comparison_page
    except ModuleNotFoundError as error:
        raise UserError(
            f"Comparisons need {error.name}: pip install -r requirements-analysis.txt"
        ) from error

    output = Path(_OUTPUT.value)
    if _OUTPUT.value:
        ownership.check(
            "--output", output, _FILES,
            is_own=lambda: has_text(output / _FILES[0], "vitcls comparison</title>"),
        )  # fmt: skip
        make_folder(output, flag="--output")
    found = comparison.compare_runs(directories, split=split, metric=_METRIC.value)
    markdown = comparison_page.to_markdown(found)
    print(markdown)
    if not _OUTPUT.value:
        return
    files = {"comparison.html": comparison_page.to_html(found), "comparison.md": markdown}
    files |= comparison_page.to_csv(found)
    contents = {name: text.encode("utf-8", errors="replace") for name, text in files.items()}
    contents["groups.png"] = comparison_page.to_png(found)
    for name, content in contents.items():
        with written_aside(output / name) as aside:
            aside.write_bytes(content)
    print(f"-> {output}/comparison.html, comparison.md, groups.png, and groups, pairs, runs.csv")


if __name__ == "__main__":
    cli.run(main, arguments="DIR")
