r"""Measures how well a checkpoint's features suit a data set, by fitting cheap heads on them.

  python -m vitcls.probe --checkpoint=google/vit-base-patch16-224-in21k --data=folder:PATH \
      --output=probed

The network sees every image once. Its pooled features are kept in OUTPUT/features and used again
by later calls. They are written as they are computed, so that the same command resumes after an
interruption. Three heads are fitted on them:

  knn    weighted nearest neighbours by cosine similarity; chooses k
  ridge  linear regression in closed form; chooses the regulariser
  probe  softmax regression, five seeds; chooses learning rate and weight decay

A stratified part of train is held out to choose these. The test split is used once, with the
choices. OUTPUT/results.json has all figures. OUTPUT/model is the checkpoint with the better linear
head, in Hugging Face format, for vitcls.evaluate, vitcls.predict and vitcls.export.
"""

from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import make_folder
from vitcls.folders import ownership

_CHECKPOINT = cli.define_checkpoint("Its head, if there is one, is not used.")
_DATA = cli.define_data()
_TRAIN_SPLIT = cli.define_split(
    "Split to fit on and to choose with", name="train_split", default="train"
)
_SPLIT = cli.define_split("Split to measure on")
_DATA_DIR = cli.define_data_dir()
_OUTPUT = flags.DEFINE(cli.PATH, "output", None, "Folder for features, results and the new model.")
_HOLDOUT = flags.DEFINE_float("holdout", 0.1, "Share of train that is held out, between 0 and 1.")
_PER_CLASS = flags.DEFINE_integer(
    "per_class",
    0,
    "Examples of every class to fit on, of those not held out. 0: all.",
    lower_bound=0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples held out and taken.")
_EPOCHS = flags.DEFINE_integer("epochs", 100, "Epochs of the linear probe.", lower_bound=1)
_BATCH_SIZE = cli.define_batch_size()


def main() -> None:
    """Checks the flags, then probes."""
    checkpoint, data, output = map(cli.required, (_CHECKPOINT, _DATA, _OUTPUT))
    output = Path(output)
    if _TRAIN_SPLIT.value == _SPLIT.value:
        raise UserError(
            f"--split={_SPLIT.value} is also --train_split, which is fitted on: name two splits."
        )
    if (output / "model").exists() and not (output / "features").exists():
        raise UserError(
            f"--output={output} has a model that vitcls.probe did not write and would replace; "
            "name another folder."
        )
    ownership.check(
        "--output", output, ["results.json", "model"],
        is_own=lambda: ownership.has_keys(output / "results.json", "checkpoint", "methods"),
    )  # fmt: skip
    # These import jax, so they follow the checks of the flags.
    from vitcls.data import sources
    from vitcls.data.sources import classes
    from vitcls.data.sources.split import num_shared
    from vitcls.probe import fitting
    from vitcls.provenance import seen

    cli.prepare_jax()
    (train, _), (test, known) = (
        seen.open_split(checkpoint, data, name, data_dir=_DATA_DIR.value or None)
        for name in (_TRAIN_SPLIT.value, _SPLIT.value)
    )
    test = classes.align(train, test)
    if shared := num_shared(test, train):
        raise UserError(
            f"--split={_SPLIT.value} shares {shared} of its {len(test)} images with --train_split="
            f"{_TRAIN_SPLIT.value}, which is fitted on: name splits of different images."
        )
    train, validation = sources.hold_out(train, _HOLDOUT.value, seed=_SEED.value)
    if _PER_CLASS.value:
        train = sources.take_per_class(train, _PER_CLASS.value, seed=_SEED.value)
    make_folder(output, flag="--output")
    content = fitting.probe(
        checkpoint,
        {"train": train, "validation": validation, "test": test},
        output,
        num_epochs=_EPOCHS.value,
        batch_size=_BATCH_SIZE.value,
        trained_on=seen.count_and_warn(known, test, data),
    )
    print(fitting.table(content))
    model = content["model"]
    print(
        f"{test.name} accuracy {model['test_accuracy']:.4f} ({len(test)} images) with the head of "
        f"{model['method']} -> {output / 'model'}"
    )


if __name__ == "__main__":
    cli.run(main)
