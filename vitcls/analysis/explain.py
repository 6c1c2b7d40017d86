"""Shows where a network looks: pictures of images under a map.

  python -m vitcls.analysis.explain --checkpoint=runs/quickstart --images=photos --output=maps
  python -m vitcls.analysis.explain --checkpoint=runs/quickstart --data=digits --num_images=20 \
      --output=maps

A picture shows the part of an image that the network saw, and next to it the same part under the
map: the brighter a place, the more it contributed to the class. maps/explained.csv lists the image
of each picture, the likeliest class with its probability, and the explained class.

  rollout           where the pooled tokens' attention comes from, through all layers; ViT only, the
                    same for every class
  gradient_rollout  the same for attention that supports the class; the default for a ViT
  gradcam           Grad-CAM of the last features that have a place; the default for a ResNet

The checkpoint is the workdir of a run (DIR, DIR@best, DIR@last or DIR@STEP), a folder in Hugging
Face format, or a hub id, optionally with @REVISION. Needs pip install -r requirements-analysis.txt.
"""

from absl import flags

from vitcls import cli
from vitcls.errors import UserError

_CHECKPOINT = cli.define_checkpoint()
_IMAGES = cli.define_images()
_DATA = cli.define_data("It takes the place of --images.")
_SPLIT = cli.define_split("Split of --data")
_DATA_DIR = cli.define_data_dir()
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 0, "Images of --data, the first; 0: all.", lower_bound=0
)
_OUTPUT = cli.define_new_folder()
_METHOD = flags.DEFINE_enum(
    "method", "", ["", "rollout", "gradient_rollout", "gradcam"],
    "rollout|gradient_rollout|gradcam; empty: by the kind of network.",
)  # fmt: skip
_CLASS = flags.DEFINE_string(
    "class", "", "Name or number of the class to explain; empty: the likeliest of each image."
)
_BATCH_SIZE = cli.define_batch_size()


def main() -> None:
    """Checks the flags, then explains."""
    checkpoint, output = map(cli.required, (_CHECKPOINT, _OUTPUT))
    if bool(_IMAGES.value) == bool(_DATA.value):
        raise UserError("Name the images with either --images or --data.")
    if _NUM_IMAGES.value and not _DATA.value:
        raise UserError("--num_images needs --data; with --images, name the files to take.")
    if _CLASS.value and _METHOD.value == "rollout":
        raise UserError(
            f"--class={_CLASS.value} has no effect on --method=rollout, which is the same for "
            "every class; use --method=gradient_rollout."
        )
    # These import jax, which takes seconds: a wrong flag should fail before.
    try:
        from vitcls.analysis import explaining
    except ModuleNotFoundError as error:
        raise UserError(
            f"Pictures need {error.name}: pip install -r requirements-analysis.txt"
        ) from error
    from vitcls.predict import rows
    from vitcls.provenance import seen

    if _DATA.value:
        split, _ = seen.open_split(
            checkpoint, _DATA.value, _SPLIT.value, data_dir=_DATA_DIR.value or None
        )
        found = explaining.split_sources(split, num=_NUM_IMAGES.value)
    else:
        found = explaining.file_sources(rows.find_images(_IMAGES.value))
    cli.prepare_jax()
    explainer = explaining.load_explainer(
        checkpoint, num_images=len(found), method=_METHOD.value, batch_size=_BATCH_SIZE.value
    )
    num_bad = explaining.write_pictures(explainer, found, output, class_name=_CLASS.value)
    bad = f", {num_bad} of them unreadable" if num_bad else ""
    print(f"{len(found)} images{bad}, {explainer.method} -> {output}")


if __name__ == "__main__":
    cli.run(main)
