"""Classifies image files by any checkpoint: class names and their probabilities.

  python -m vitcls.predict --checkpoint=runs/quickstart --images=photos --output=preds.csv

The checkpoint is the workdir of a run (DIR, DIR@best, DIR@last or DIR@STEP), a folder in Hugging
Face format, or a hub id such as google/vit-base-patch16-224, optionally with @REVISION.

CSV has one row per image: image, label, probability, error; with --top_k=K label_1, probability_1,
..., label_K, probability_K. JSON lines have one object per image: image and predictions, or image
and error. Images that cannot be read are reported and do not stop the others. An npz file has the
logits and ids of the images that can be read, for --unknown of the analyses.

With --reject, images that the network should not answer have no label in CSV, and "rejected": true
in JSON lines. Probabilities are then calibrated. docs/decision.md says how that is chosen.
"""

import sys

from absl import flags

from vitcls import cli

_CHECKPOINT = cli.define_checkpoint()
_IMAGES = cli.define_images()
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", "-", "File to write, .csv, .jsonl or .npz. -: CSV to standard output."
)
_TOP_K = flags.DEFINE_integer("top_k", 1, "Classes per image, the likeliest first.")
_REJECT = cli.define_reject()
_BATCH_SIZE = cli.define_batch_size()


def main() -> None:
    """Checks the flags, then predicts."""
    checkpoint, images = cli.required(_CHECKPOINT), cli.required(_IMAGES)
    # These import jax, so they follow the checks of the flags.
    from vitcls.decision import kept
    from vitcls.predict import rows

    output, top_k = _OUTPUT.value, _TOP_K.value
    rows.check_output(output)
    paths = rows.find_images(images)
    cli.prepare_jax()
    rule = kept.require(checkpoint)[0] if _REJECT.value else None
    found = rows.predict_files(
        checkpoint, paths, top_k=top_k, batch_size=_BATCH_SIZE.value, rule=rule,
        keep_logits=output.endswith(".npz"),
    )  # fmt: skip
    num_bad, num_rejected = rows.write_rows(found, output, top_k=top_k, num_rows=len(paths))
    line = f"{len(paths)} images" + (f", {num_bad} of them unreadable" if num_bad else "")
    line += f", {num_rejected} rejected" if rule else ""
    if output == "-":  # standard output has the rows
        print(line, file=sys.stderr)
    else:
        print(f"{line} -> {output}")


if __name__ == "__main__":
    cli.run(main)
