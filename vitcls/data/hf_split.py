"""Data sets of the Hugging Face hub or in its formats: `hf:ID_OR_PATH[:CONFIG]`.

A path is a folder of Parquet files or of images, or what `save_to_disk` has written. Columns are
found by their types, or named: `hf:ID_OR_PATH?image=COLUMN&label=COLUMN`. Rows keep their order. A
data set with the only split "train" is divided into train and test, as folders without splits are.

Needs the optional package `datasets`, which is imported only here and only when it is used.
"""

import functools
import hashlib
import logging
import os
import pathlib
from typing import Any

import numpy as np

from vitcls.data.csv_split import parse_columns
from vitcls.data.files_split import divide
from vitcls.data.split import Split
from vitcls.errors import STORAGE_ERRNOS, StorageError, UserError, unknown
from vitcls.progress import on_terminal

log = logging.getLogger("vitcls")

_LABEL_NAMES = ("label", "labels", "class", "target")  # of columns without names of classes
_NUM_SAMPLED = 32
_BATCH = 1000


class HfSplit(Split):
    """The rows of a table; images stay encoded."""

    def __init__(self, name: str, table: Any, *, columns: dict[str, str], classes: dict[Any, str]):
        """Reads all labels and the sizes of all images, and a few of these.

        Args:
          name: The split's.
          table: A `datasets.Dataset`.
          columns: Names of those of the "image" and the "label".
          classes: The class of each value of the label column, in the order of the classes.

        Raises:
          UserError: A row has no label or no image.
        """
        import datasets

        self.name = name
        self.class_names = tuple(dict.fromkeys(classes.values()))
        self._image, label = columns["image"], columns["label"]
        numbers = {value: self.class_names.index(one) for value, one in classes.items()}
        values = table.select_columns([label])[:][label]
        self._labels = np.array([numbers.get(value, -1) for value in values], np.int32)
        if not len(table):
            raise UserError(f"Split {name!r} is empty; choose another.")
        if self._labels.min() < 0:
            raise UserError(
                f"Row {self._labels.argmin()} of split {name!r} has no label; choose another split."
            )
        # Without decoding, rows have the files' bytes, or the path of a file.
        self._table = table.select_columns([self._image]).cast_column(
            self._image, datasets.Image(decode=False)
        )
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        digest.update(self._labels.astype("<i4").tobytes())
        digest.update(self._sizes().tobytes())
        for index in np.linspace(0, len(self) - 1, _NUM_SAMPLED, dtype=np.int64).tolist():
            digest.update(hashlib.sha256(self.read(index)[0]).digest())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example.

        Raises:
          StorageError: A file is gone, or the disk fails.
        """
        stored = self._table[index][self._image]
        label = int(self._labels[index])
        if stored["bytes"] is not None:
            return stored["bytes"], label
        try:
            return pathlib.Path(stored["path"]).read_bytes(), label
        except OSError as error:
            raise StorageError(f"Cannot read {stored['path']}: {error.strerror}.") from error

    def id(self, index: int) -> str:
        """Split and row."""
        return f"{self.name}/{index}"

    def labels(self) -> np.ndarray:
        """All labels, int32 (N,)."""
        return self._labels

    def _sizes(self) -> np.ndarray:
        """Bytes of every encoded image, int64 (N,), from the table's offsets: no image is read."""
        import pyarrow.compute as pc

        sizes = []
        for batch in self._table.with_format("arrow").iter(_BATCH):
            column = batch.column(self._image).combine_chunks()
            found = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
            paths = pc.struct_field(column, "path").to_pylist()
            for size, path in zip(found, paths, strict=True):
                try:
                    sizes.append(os.path.getsize(path or "") if size is None else size)
                except OSError as error:
                    raise UserError(
                        f"Row {len(sizes)} of split {self.name!r} has no image"
                        + (f": {path}: {error.strerror}." if path else ".")
                    ) from error
        return np.array(sizes, "<i8")


def open_hf(source: str, split: str) -> Split:
    """Opens a split of a data set on the hub, which is downloaded first, or of a local one.

    Args:
      source: ID_OR_PATH[:CONFIG][?image=COLUMN&label=COLUMN].
      split: Its name.

    Raises:
      UserError: `datasets` is not installed, or there is no such data set, split or column.
      StorageError: The data cannot be written or read.
    """
    path, _, query = source.partition("?")
    tables = _load(path)
    columns = _find_columns(path, tables, parse_columns(f"hf:{path}", query, ("image", "label")))
    classes = _find_classes(tables, columns["label"])
    if list(tables) == ["train"] and split in ("train", "test"):
        return divide(HfSplit("train", tables["train"], columns=columns, classes=classes), split)
    if split not in tables:
        raise unknown(f"split of hf:{path}", split, tables)
    return HfSplit(split, tables[split], columns=columns, classes=classes)


def hf_split_names(source: str) -> list[str]:
    """Names of the splits that `open_hf` opens."""
    names = list(_load(source.partition("?")[0]))
    return ["train", "test"] if names == ["train"] else names


# A run opens several splits of one data set; what is kept are maps of files.
@functools.lru_cache(maxsize=1)
def _load(source: str) -> dict[str, Any]:
    """The tables of all splits, `datasets.Dataset` by name."""
    if not source:
        raise UserError("data.source='hf:' names no data set; hf:uoft-cs/cifar10, for example.")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source='hf:{source}' needs the package `datasets`, which is optional: "
            "pip install -r requirements-hf.txt"
        ) from error
    if not on_terminal():
        datasets.disable_progress_bars()
    path, config = os.path.expanduser(source), None
    if not os.path.exists(path) and ":" in path:
        path, config = path.rsplit(":", 1)
    try:
        if any(
            os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")
        ):
            found = datasets.load_from_disk(path)
        elif os.path.isfile(path):
            found = datasets.load_dataset("parquet", data_files=path)
        else:
            found = datasets.load_dataset(path, config)
    # Types of many libraries: of the hub, of the network, of files in all formats.
    except Exception as error:
        if getattr(error, "errno", None) in STORAGE_ERRNOS:
            raise StorageError(f"Cannot open hf:{source}: {error}") from error
        raise UserError(f"hf:{source} cannot be opened: {error}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _find_columns(path: str, tables: dict[str, Any], chosen: dict[str, str]) -> dict[str, str]:
    """Names of the columns of the image and the label."""
    import datasets

    features = next(iter(tables.values())).features
    usual = {
        "image": [name for name in features if isinstance(features[name], datasets.Image)],
        "label": [name for name in features if isinstance(features[name], datasets.ClassLabel)]
        or [name for name in features if name in _LABEL_NAMES],
    }
    columns = {}
    for role, names in usual.items():
        if role in chosen and chosen[role] not in features:
            raise unknown(f"column of hf:{path}", chosen[role], features)
        if role not in chosen and len(names) != 1:
            raise UserError(
                f"hf:{path} has {'several columns' if names else 'no column'} that could be the "
                f"{role}, of {', '.join(features)}; choose one: hf:{path}?{role}=COLUMN"
            )
        columns[role] = chosen.get(role) or names[0]
    return columns


def _find_classes(tables: dict[str, Any], label: str) -> dict[Any, str]:
    """The class of each value of the label; values without names are names themselves."""
    import datasets

    feature = next(iter(tables.values())).features[label]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    if not isinstance(feature, datasets.Value):
        raise UserError(
            f"Column {label!r} has not one label per image but {feature}; choose a data set for "
            "image classification, or another column."
        )
    values = set().union(*(table.unique(label) for table in tables.values())) - {None}
    return {value: str(value) for value in sorted(values)}
