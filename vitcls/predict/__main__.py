"""Names what images show: classes and their probabilities, by any checkpoint.

  python -m vitcls.predict --checkpoint=runs/quickstart --images=photos --output=preds.csv

The checkpoint is the workdir of a run (DIR, DIR@best, DIR@last or DIR@STEP), a folder in Hugging
Face format, or a hub id such as google/vit-base-patch16-224, optionally with @REVISION.

Each image has a row of image, label, probability and error; with --top_k=K of label_1,
probability_1, ..., label_K, probability_K. In JSON lines it is an object of image and predictions,
or of image and error. Images that cannot be read are reported and do not stop the others.
"""

import sys

from absl import flags

from vitcls import cli

_CHECKPOINT = cli.define_checkpoint()
_IMAGES = cli.define_images()
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", "-", "File to write, .csv or .jsonl; - is CSV to standard output."
)
_TOP_K = flags.DEFINE_integer("top_k", 1, "Number of classes per image, the likeliest first.")
_BATCH_SIZE = cli.define_batch_size()


def main() -> None:
    """Checks the flags, then predicts."""
    checkpoint, images = cli.required(_CHECKPOINT), cli.required(_IMAGES)
    from vitcls.predict import (
        rows as prediction,  # imports jax: only once the flags are known to be right
    )

    output, top_k = _OUTPUT.value, _TOP_K.value
    prediction.check_output(output)
    paths = prediction.find_images(images)
    cli.prepare_jax()
    rows = prediction.predict_files(checkpoint, paths, top_k=top_k, batch_size=_BATCH_SIZE.value)
    num_bad = prediction.write_rows(rows, output, top_k=top_k, num_rows=len(paths))
    line = f"{len(paths)} images" + (f", {num_bad} of them unreadable" if num_bad else "")
    if output == "-":  # where the rows are
        print(line, file=sys.stderr)
    else:
        print(f"{line} -> {output}")


if __name__ == "__main__":
    cli.run(main)
