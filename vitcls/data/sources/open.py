"""Data sets by name: `open_split("digits", "train")`."""

import logging
import os

from vitcls.data.sources import builders
from vitcls.data.sources.csv_file import csv_split_names, open_csv
from vitcls.data.sources.division import hold_out, take_fold, take_long_tail, take_per_class
from vitcls.data.sources.files import DividedSplit
from vitcls.data.sources.folder import folder_split_names, open_folder
from vitcls.data.sources.hf import hf_split_names, open_hf
from vitcls.data.sources.prepare import prepare_once
from vitcls.data.sources.split import Split, Subset
from vitcls.data.sources.tfds import TfdsSplit
from vitcls.errors import unknown
from vitcls.folders import user_folders

log = logging.getLogger("vitcls")

__all__ = [
    "Split", "Subset", "hold_out", "home", "open_split", "split_names", "take_fold",
    "take_long_tail", "take_per_class",
]  # fmt: skip

_SCHEMES = (
    *builders.BUILT_IN, "tfds:NAME[/CONFIG][:VERSION]", "folder:PATH", "csv:PATH", "hf:ID_OR_PATH",
)  # fmt: skip

_OPENERS = {"folder": open_folder, "csv": open_csv, "hf": open_hf}


def open_split(
    source: str, split: str, *, data_dir: str | None = None, division: str = "hash"
) -> Split:
    """Opens one split of a data set, after preparing it if necessary.

    Sources with the same images in the same order under the same class names give the same batches.
    Files are ordered by class and path; records keep the order that they are stored in.

    Args:
      source: `digits`, `glyphs`, `tfds:NAME[/CONFIG][:VERSION]`; `folder:PATH` with
        PATH/split/class/image or PATH/class/image; `csv:PATH`, see `csv_file`; or
        `hf:ID_OR_PATH[:CONFIG]`, see `hf`.
      split: Name; of tfds also an expression as in `tfds.load`, such as "train[:90%]".
      data_dir: Folder of all tfds data; None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      division: How data without splits are divided, one of `division.DIVISIONS`.

    Raises:
      UserError: Unknown source or split, or data that cannot be prepared or used.
      StorageError: The data cannot be written.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "hf":
        _check_hub_folder(rest)
    if scheme in _OPENERS:
        # Before data.division existed, classes were not ordered by number: such runs stay so.
        order = {"order": sorted} if division != "hash" and scheme == "folder" else {}
        opened = _OPENERS[scheme](rest, split, **order)
        if division != "hash" and isinstance(opened, DividedSplit):
            opened = opened.divided_by(division)
    else:
        builder = _prepared(source, data_dir)
        opened = TfdsSplit(builder, split)
        opened.found = (
            f"Splits: {', '.join(builder.info.splits)}. {len(opened)} images of "
            f"{len(opened.class_names)} classes in {builder.info.full_name}."
        )
    # Unused files may be a mistake of the user.
    level = logging.WARNING if "Not used: " in opened.found else logging.INFO
    log.log(level, "%s: %s", split, opened.found)
    return opened


def home(source: str) -> str:
    """Where a source's ids are unique: the folder that their paths start from, or a data set.

    Ids of two sources with one home can be compared.
    """
    scheme, _, rest = source.partition(":")
    path = os.path.expanduser(rest.partition("?")[0])
    if scheme == "folder":
        return os.path.realpath(path)
    if scheme == "csv":
        return os.path.realpath(os.path.dirname(path))
    if scheme == "hf":
        return "hf:" + (os.path.realpath(path) if os.path.exists(path) else path)
    return "tfds"  # where ids name the data set


def split_names(source: str, *, data_dir: str | None = None) -> list[str]:
    """Names of the splits of a data set, after preparing it if necessary.

    Args and Raises: as for `open_split`.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "folder":
        return folder_split_names(rest)
    if scheme == "csv":
        return csv_split_names(rest)
    if scheme == "hf":
        _check_hub_folder(rest)
        return hf_split_names(rest)
    return list(_prepared(source, data_dir).info.splits)


def _check_hub_folder(path: str) -> None:
    """`datasets` copies what it reads into its cache, unless `save_to_disk` wrote it."""
    own = ("dataset_dict.json", "state.json")
    if not any(os.path.exists(os.path.join(os.path.expanduser(path), name)) for name in own):
        user_folders.check_home(
            f"The data of hf:{path}", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"
        )


def _prepared(source: str, data_dir: str | None):
    if source not in builders.BUILT_IN and not source.startswith("tfds:"):
        raise unknown("data source", source, _SCHEMES)
    return prepare_once(source, data_dir=data_dir)
