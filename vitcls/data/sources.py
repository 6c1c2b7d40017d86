"""Data sets by name: `open_split("digits", "train")`."""

from vitcls.data import builders
from vitcls.data.folder_split import open_folder
from vitcls.data.prepare import prepare_once
from vitcls.data.split import Split, Subset, hold_out, take_per_class
from vitcls.data.tfds_split import TfdsSplit
from vitcls.errors import unknown

__all__ = ["Split", "Subset", "hold_out", "open_split", "take_per_class"]

_SCHEMES = (*builders.BUILT_IN, "tfds:NAME[/CONFIG][:VERSION]", "folder:PATH")


def open_split(source: str, split: str, *, data_dir: str | None = None) -> Split:
    """Opens one split of a data set, which is prepared first where it is not.

    Args:
      source: `digits`, `glyphs`, `tfds:NAME[/CONFIG][:VERSION]`, or `folder:PATH` with
        PATH/split/class/image or PATH/class/image.
      split: Name; of all but folders also an expression as in `tfds.load`, such as "train[:90%]".
      data_dir: Folder of all tfds data; None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      UserError: Unknown source or split, or data that cannot be prepared or used.
      StorageError: The data cannot be written.
    """
    if source.startswith("folder:"):
        return open_folder(source.removeprefix("folder:"), split)
    if source not in builders.BUILT_IN and not source.startswith("tfds:"):
        raise unknown("data source", source, _SCHEMES)
    return TfdsSplit(prepare_once(source, data_dir=data_dir), split)
