"""Evaluates any checkpoint on any split of a data set, exactly.

  python -m vitcls.evaluate --checkpoint=runs/quickstart --data=digits --split=test

The checkpoint is the workdir of a run (DIR, DIR@best, DIR@last or DIR@STEP), a folder in Hugging
Face format, or a hub id such as google/vit-base-patch16-224, optionally with @REVISION.

Classes are matched by their names, in any order, and the checkpoint may have more than the data.
--labels=index matches them by position: for data with the same classes in the same order under
other names, such as ImageNet from tfds and from the hub.

Data without splits are divided as the checkpoint's run divided them. A warning gives the number of
images that the run was trained on, which is also trained_on in the results.

--reject adds how many images are answered above the threshold of the checkpoint's decision.json,
and how many of these rightly, as "rejection" in the results. docs/decision.md has more.
"""

from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.errors import UserError
from vitcls.files import make_folder, write_json
from vitcls.folders import ownership
from vitcls.folders.ownership import has_keys

_CHECKPOINT = cli.define_checkpoint()
_DATA = cli.define_data()
_SPLIT = cli.define_split("Split to evaluate")
_DATA_DIR = cli.define_data_dir()
_LABELS = cli.define_labels()
_BATCH_SIZE = cli.define_batch_size()
_TTA = flags.DEFINE_enum(
    "tta", "none", ["none", "flip"],
    "Test-time augmentation: flip averages the logits of image and mirror image.",
)  # fmt: skip
_REJECT = cli.define_reject()
_ON_ERROR = cli.define_on_error()
_OUTPUT = flags.DEFINE(
    cli.PATH,
    "output",
    "",
    "Folder for results.json and predictions/SPLIT.npz. Empty: no files.",
)


def main() -> None:
    """Checks the flags, then evaluates."""
    checkpoint, data = cli.required(_CHECKPOINT), cli.required(_DATA)
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if _ON_ERROR.value == "skip" and output is None:
        raise UserError("--on_error=skip needs --output, a folder for the list of skipped images.")
    if output is not None and (output / "checkpoints").exists():
        raise UserError(
            f"--output={output} is the workdir of a run, whose results.json would be replaced; "
            "name another folder."
        )
    if output is not None:
        ownership.check(
            "--output", output, ["results.json", "predictions", "skipped.jsonl"],
            is_own=lambda: has_keys(output / "results.json", "checkpoint", "data", "split")
            or has_keys(output / "skipped.jsonl", "split", "id", "reason"),
        )  # fmt: skip
    # These import jax, so they follow the checks of the flags.
    from vitcls.data.skipped import Skipped
    from vitcls.decision import kept
    from vitcls.evaluate import exact
    from vitcls.provenance import records, seen
    from vitcls.provenance.results import count_images

    cli.prepare_jax()
    rule, promised = kept.require(checkpoint, tta=_TTA.value) if _REJECT.value else (None, None)
    split, known = seen.open_split(checkpoint, data, _SPLIT.value, data_dir=_DATA_DIR.value or None)
    trained_on = seen.count_and_warn(known, split, data)
    skipped = None
    if output is not None:
        make_folder(output, flag="--output")
        (output / "skipped.jsonl").unlink(missing_ok=True)
    if _ON_ERROR.value == "skip":
        skipped = Skipped(output / "skipped.jsonl")
    metrics, predictions = exact.evaluate_checkpoint(
        checkpoint,
        split,
        labels=_LABELS.value,
        batch_size=_BATCH_SIZE.value,
        tta=_TTA.value,
        skipped=skipped,
    )
    metrics["trained_on"] = trained_on
    rejection = rule and rule.measure(predictions["labels"], predictions["logits"])
    if output is not None:
        # results.json comes first: it marks the folder as made by this command.
        origin = {"checkpoint": checkpoint, "data": data, "split": split.name}
        origin["fingerprint"] = split.fingerprint
        rejected = {"rejection": rejection} if rejection else {}
        write_json(output / "results.json", origin | metrics | rejected)
        ids = [split.id(index) for index in predictions.pop("index").tolist()]
        records.save_predictions(
            output / "predictions" / f"{split.name}.npz", ids=ids, **predictions
        )
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    if rejection:
        print(f"promised {kept.describe(promised)}")
        print(f"found {kept.describe(rejection | {'split': split.name})}")
    print(f"{split.name} accuracy {metrics['accuracy']:.4f} ({count_images(metrics)})")


if __name__ == "__main__":
    cli.run(main)
