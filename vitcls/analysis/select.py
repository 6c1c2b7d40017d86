r"""Chooses a checkpoint to fine-tune, by cheap heads on the features of each, and shows costs.

  python -m vitcls.analysis.select --data=folder:PATH --output=selected \
      --candidates=google/vit-base-patch16-224-in21k,facebook/dinov2-small,runs/mine@best

Every candidate sees every image once. On its features a linear probe and nearest neighbours are
fitted, as in vitcls.probe. All images come from the training split: a held-out part ranks the
candidates, a tenth of the rest selects hyper-parameters. The test split is never read.

The command prints a sentence and a table: the choice, the candidates that cannot be told apart from
it, parameters, GFLOPs and images/s. OUTPUT gets these as selection.md and selection.csv, and a plot
of accuracy against cost as selection.png and selection.svg. Features stay in OUTPUT/features, where
they are written as they are computed: the same command resumes after an interruption, and one with
more candidates computes only theirs. A candidate that cannot be read is listed with the reason.

Needs pip install -r requirements-analysis.txt.
"""

from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import make_folder, written_aside
from vitcls.folders import ownership
from vitcls.folders.ownership import has_text

_CANDIDATES = flags.DEFINE_list(
    "candidates", None,
    "Checkpoints, separated by commas: workdirs (DIR, DIR@best, DIR@last, DIR@STEP), Hugging Face "
    "folders or hub ids; heads that they may have are not used.",
)  # fmt: skip
_DATA = cli.define_data()
_TRAIN_SPLIT = cli.define_split(
    "Split to fit, to choose and to rank on", name="train_split", default="train"
)
_DATA_DIR = cli.define_data_dir()
_OUTPUT = flags.DEFINE(
    cli.PATH,
    "output",
    None,
    "Folder for features, table and picture; those of an earlier call are replaced.",
)
_HOLDOUT = flags.DEFINE_float("holdout", 0.2, "Share of the split that ranks, between 0 and 1.")
_PER_CLASS = flags.DEFINE_integer(
    "per_class", 0,
    "Examples of every class to fit on, as few as fine-tuning will have; 0: all that remain.",
    lower_bound=0,
)  # fmt: skip
_SEED = flags.DEFINE_integer("seed", 0, "Which examples are held out and taken.")
_EPOCHS = flags.DEFINE_integer("epochs", 100, "Passes of the linear probe.", lower_bound=1)
_BATCH_SIZE = cli.define_batch_size()


def main() -> None:
    """Checks the flags, then measures, prints and writes."""
    names, data, output = map(cli.required, (_CANDIDATES, _DATA, _OUTPUT))
    names = [name.strip() for name in names]
    if not all(names):
        raise UserError(f"--candidates={','.join(names)} has an empty name between its commas.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--candidates names {twice[0]} twice; name every candidate once.")
    output = Path(output)
    ownership.check(
        "--output", output, [f"selection.{suffix}" for suffix in ("md", "csv", "png", "svg")],
        is_own=lambda: has_text(output / "selection.md", "# Which checkpoint", at_start=True),
    )  # fmt: skip
    if not 0 < _HOLDOUT.value < 1:
        raise UserError(f"--holdout={_HOLDOUT.value} must be above 0 and below 1, such as 0.2.")
    try:
        from vitcls.analysis import selection, selection_page
    except ModuleNotFoundError as error:
        raise UserError(
            f"Selection needs {error.name}: pip install -r requirements-analysis.txt"
        ) from error
    from vitcls.data import sources

    cli.prepare_jax()
    split = sources.open_split(data, _TRAIN_SPLIT.value, data_dir=_DATA_DIR.value or None)
    parts = selection.divide(
        split, holdout=_HOLDOUT.value, per_class=_PER_CLASS.value, seed=_SEED.value
    )
    make_folder(output, flag="--output")
    found = selection.select(
        names,
        parts,
        folder=output / "features",
        num_epochs=_EPOCHS.value,
        batch_size=_BATCH_SIZE.value,
        source=data,
        data_dir=_DATA_DIR.value or None,
    )
    markdown = selection_page.to_markdown(found)
    print(markdown)
    files = {"md": markdown.encode(), "csv": selection_page.to_csv(found).encode()}
    for suffix, content in (files | selection_page.to_pictures(found)).items():
        with written_aside(output / f"selection.{suffix}") as aside:
            aside.write_bytes(content)
    print(f"-> {output}/selection.png, selection.svg, selection.md, selection.csv")


if __name__ == "__main__":
    cli.run(main)
