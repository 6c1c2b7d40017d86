"""Averages the weights of checkpoints: uniform soups, greedy soups and WiSE-FT.

  python -m vitcls.soup --checkpoints='runs/seed-*' --how=uniform --output=soup
  python -m vitcls.soup --checkpoints=runs/a,runs/b@best,runs/c@900 --how=greedy --output=soup
  python -m vitcls.soup --checkpoints=runs/a --how=wise --output=soup

--how=uniform: the mean of all weights.
--how=greedy: adds checkpoints from the best to the worst; keeps each that does not lower the score.
--how=wise: WiSE-FT, the best of eleven points between the pretrained weights and those of one
checkpoint. With --alpha it takes that point and evaluates nothing.

Checkpoints are workdirs (DIR, DIR@best, DIR@last, DIR@STEP, or DIR@all for all that a run keeps),
folders in Hugging Face format, hub ids, or patterns of folders in quotes. They must be the same
network with the same classes. If a run averaged its weights (optim.ema_decay), these are used.

Soups are chosen on the split that the runs chose their best checkpoints on. Images that a run was
trained on are refused, and so are those of its data.eval_splits.

--output becomes a folder in Hugging Face format, for evaluate, predict, export and further
training, with a record of all trials in soup.json. docs/recipes.md says when to use which.
"""

from absl import flags

from vitcls import cli
from vitcls.config.fields import SELECT_METRICS
from vitcls.errors import UserError

_CHECKPOINTS = flags.DEFINE_string("checkpoints", None, "Checkpoints, separated by commas.")
_HOW = flags.DEFINE_enum("how", None, ["uniform", "greedy", "wise"], "What to make, see above.")
_OUTPUT = cli.define_new_folder()
_DATA = cli.define_data("It is evaluated to choose. Empty: that of the runs.")
_SPLIT = cli.define_split(
    "Split of --data", default="",
    note="Empty: the one that the runs chose on; holdout: the images that a run held out of its "
    "training images.",
)  # fmt: skip
_DATA_DIR = cli.define_data_dir("where the runs had them")
_ALLOW_EVAL_SPLIT = flags.DEFINE_bool(
    "allow_eval_split", False,
    "Allow images of the runs' data.eval_splits to choose; they cannot measure the soup then.",
)  # fmt: skip
_METRIC = flags.DEFINE_enum("metric", "accuracy", SELECT_METRICS, "Metric that chooses.")
_LABELS = cli.define_labels()
_BATCH_SIZE = cli.define_batch_size()
_ON_ERROR = cli.define_on_error()
_ALPHA = flags.DEFINE_float(
    "alpha", None,
    "--how=wise: the point on the line, from 0, pretrained, to 1, fine-tuned. The paper recommends "
    "0.5 without images to choose on. Not set: the best of 0, 0.1, ... 1.",
    lower_bound=0, upper_bound=1,
)  # fmt: skip
_PRETRAINED = flags.DEFINE_string(
    "pretrained", "", "--how=wise: the pretrained checkpoint. Empty: the one that the run names."
)

_SELECTION = (
    _DATA, _SPLIT, _DATA_DIR, _ALLOW_EVAL_SPLIT, _METRIC, _LABELS, _BATCH_SIZE, _ON_ERROR,
)  # fmt: skip


def main() -> None:
    """Checks the flags, then makes the soup."""
    checkpoints, how, output = map(cli.required, (_CHECKPOINTS, _HOW, _OUTPUT))
    if how != "wise":
        _refuse((_ALPHA, _PRETRAINED), f"is for --how=wise only, not for --how={how}")
    if how == "uniform" or _ALPHA.value is not None:
        _refuse(
            _SELECTION,
            "has no effect: uniform soups, and WiSE-FT with --alpha, evaluate nothing "
            f"(python -m vitcls.evaluate --checkpoint={output} does)",
        )
    from vitcls.soup import mixing  # imports jax, so it follows the checks of the flags

    cli.prepare_jax()
    record = mixing.make(
        checkpoints,
        how=how,
        output=output,
        start=_PRETRAINED.value,
        alpha=_ALPHA.value,
        metric=_METRIC.value,
        on_error=_ON_ERROR.value,
        labels=_LABELS.value,
        batch_size=_BATCH_SIZE.value,
        source=_DATA.value,
        split=_SPLIT.value,
        data_dir=_DATA_DIR.value,
        allow_eval_split=_ALLOW_EVAL_SPLIT.value,
    )
    print(f"{mixing.describe(record)} -> {output}")


def _refuse(unused: tuple[flags.FlagHolder, ...], why: str) -> None:
    for flag in unused:
        if flag.present:
            raise UserError(f"--{flag.name}={flag.value} {why}; leave it out.")


if __name__ == "__main__":
    cli.run(main)
