"""Checks every image of a data set, and reports what would go wrong in training on it.

  python -m vitcls.check_data --data=folder:PATH --output=checked

Prints counts per class, sizes, unreadable, tiny and animated images, and duplicates within and
across splits, with equal or nearly equal pixels. With --output, the folder gets report.json with
all of this, contact_sheet.png, and duplicates.png if there are any.

With --config, the data set is that of the config, and augmented.png shows the first images as the
network will see them, cropped and augmented, with their labels:

  python -m vitcls.check_data --config=configs/vit_b16.py:data=folder:PATH --output=checked

Exits with 2 if training would fail.
"""

from pathlib import Path

from absl import flags

from vitcls import cli
from vitcls.config.checks import check_config
from vitcls.errors import UserError
from vitcls.files import make_folder, write_json
from vitcls.folders import ownership

_DATA = cli.define_data("Empty: the config's.")
_SPLITS = flags.DEFINE_list(
    "splits", [], "Splits, the training split first. Empty: the config's, else all."
)
_DATA_DIR = cli.define_data_dir("the config's, else tensorflow_datasets' default")
_OUTPUT = flags.DEFINE(
    cli.PATH, "output", "", "Folder for report.json and pictures. Empty: no files."
)
_CONFIG = cli.define_config("Its augmented images are shown.")


def main() -> None:
    """Checks the flags, then the data."""
    source, data_dir, names, options = _DATA.value, _DATA_DIR.value, _SPLITS.value, {}
    config = None if _CONFIG.value is None else cli.config_value(_CONFIG)
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if config is None:
        cli.required(_DATA)
    else:
        if output is None:
            raise UserError("--config needs --output, the folder for augmented.png.")
        data = config.data
        data.source, data.data_dir = source or data.source, data_dir or data.data_dir
        check_config(config)
        source, data_dir = data.source, data.data_dir
        options = {"division": data.division or "hash", "on_error": data.on_error}
        used = [data.train_split, config.eval.select_split, *data.eval_splits]
        names = names or [name for name in dict.fromkeys(used) if name not in ("", "holdout")]
    # This imports jax, so it follows the checks of the flags.
    from vitcls.check_data import checks

    if output is not None:
        ownership.check(
            "--output", output,
            ["report.json", "contact_sheet.png", "duplicates.png", "augmented.png"],
            is_own=lambda: ownership.has_keys(output / "report.json", "data", "splits", "problems"),
        )  # fmt: skip
        make_folder(output, flag="--output")
    splits, report = checks.check(source, names, data_dir=data_dir or None, **options)
    print(checks.format_report(report))
    if output is not None:
        write_json(output / "report.json", report)
        if splits:
            checks.draw_examples(splits, report).save(output / "contact_sheet.png")
        if report["duplicates"]:
            checks.draw_duplicates(splits, report).save(output / "duplicates.png")
    if report["problems"]:
        raise UserError("Training would fail:\n  " + "\n  ".join(report["problems"]))
    if config is not None:
        checks.check_training(config, report)
        checks.draw_training(config).save(output / "augmented.png")
    print(f"{source}: nothing would stop training" + (f" -> {output}" if output else ""))


if __name__ == "__main__":
    cli.run(main)
