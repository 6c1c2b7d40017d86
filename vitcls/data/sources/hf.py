"""Data sets of the Hugging Face hub or in its formats: `hf:ID_OR_PATH[:CONFIG]`.

A path is a folder of Parquet files or of images, or what `save_to_disk` has written. Columns are
found by their types in each split, or named: `hf:ID_OR_PATH?image=COLUMN&label=COLUMN`. Rows keep
their order. Classes have the names of the split itself: another split may number them differently.

A data set with the only split "train" may have a column that tells others, or one is named with
`split=COLUMN`. Otherwise, and with `split=` alone, it is divided into train and test, as folders
without splits are.

Needs the optional package `datasets`, which is imported only here and only when it is used.
"""

import functools
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls.data.sources import classes, image_files, split_roles
from vitcls.data.sources.csv_file import parse_columns
from vitcls.data.sources.files import divide, show
from vitcls.data.sources.split import Split, Subset
from vitcls.errors import STORAGE_ERRNOS, StorageError, UserError, unknown
from vitcls.logs.progress import on_terminal

log = logging.getLogger("vitcls")

_LABEL_NAMES = ("label", "labels", "class", "target")  # of columns without names of classes
_MAX_SPLITS = 20  # a column with more different values does not name splits
_NUM_SAMPLED = 32
_BATCH = 1000


class HfSplit(Split):
    """The rows of a table; images stay encoded."""

    def __init__(
        self,
        name: str,
        table: Any,
        *,
        columns: dict[str, str],
        class_names: Sequence[str],
        class_of: dict[Any, str],
    ):
        """Reads all labels, the sizes of all images, and a few images.

        Args:
          name: Name of the split.
          table: A `datasets.Dataset`.
          columns: Names of the columns of "image" and "label".
          class_names: In the order of the labels.
          class_of: The class of each value of the label column.

        Raises:
          UserError: A row has no label or no image.
        """
        import datasets

        self.name = self._table_name = name
        self.class_names = tuple(class_names)
        self._image, label = columns["image"], columns["label"]
        places = {one: place for place, one in enumerate(self.class_names)}
        numbers = {value: places[one] for value, one in class_of.items()}
        values = table.select_columns([label])[:][label]
        self._labels = np.array([numbers.get(value, -1) for value in values], np.int32)
        if not len(table):
            raise UserError(f"Split {name!r} is empty; choose another.")
        if self._labels.min() < 0:
            raise UserError(
                f"Row {self._labels.argmin()} of split {name!r} has no label; choose another split."
            )
        # Without decoding, a row has the bytes of a file or its path.
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
        """The split's own name, however it was asked for, and the row."""
        return f"{self._table_name}/{index}"

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
    """Opens a split of a data set, local or downloaded from the hub.

    Args:
      source: ID_OR_PATH[:CONFIG][?image=COLUMN&label=COLUMN].
      split: Its name.

    Raises:
      UserError: `datasets` is not installed, or the data set, split or column is unknown.
      StorageError: The data cannot be written or read.
    """
    path, _, query = source.partition("?")
    chosen = parse_columns(f"hf:{path}", query, ("image", "label", "split"))
    tables = _load(path)
    column = _find_split_column(path, tables, chosen)
    if column:
        (only, table) = next(iter(tables.items()))
        values, found = _column_splits(table, column)
        name = split_roles.find(f"split of hf:{path}", split, dict.fromkeys(values))
        whole = _open_table(path, tables, only, chosen)
        opened = Subset(split, whole, indices=[i for i, one in enumerate(values) if one == name])
    elif not _is_divided(tables):
        name = split_roles.find(f"split of hf:{path}", split, tables)
        opened = _open_table(path, tables, name, chosen)
        opened.name, found = split, f"Splits: {', '.join(split_roles.offered(tables))}."
    elif split not in ("train", "test"):
        raise unknown(f"split of hf:{path}", split, ("train", "test"))
    else:
        opened = divide(_open_table(path, tables, next(iter(tables)), chosen), split)
        found = "One split without a column of others: a fifth of every class is 'test'."
    opened.found = (
        f"{found} {len(opened)} images of {len(opened.class_names)} classes in hf:{path}."
    )
    return opened


def hf_split_names(source: str) -> list[str]:
    """Names of the splits that `open_hf` opens."""
    path, _, query = source.partition("?")
    tables = _load(path)
    chosen = parse_columns(f"hf:{path}", query, ("image", "label", "split"))
    if column := _find_split_column(path, tables, chosen):
        values, _ = _column_splits(next(iter(tables.values())), column)
        return list(split_roles.offered(dict.fromkeys(values)))
    return ["train", "test"] if _is_divided(tables) else list(split_roles.offered(tables))


def _is_divided(tables: dict[str, Any]) -> bool:
    return len(tables) == 1 and split_roles.role_of(next(iter(tables))) == "train"


def _open_table(path: str, tables: dict[str, Any], name: str, chosen: dict[str, str]) -> HfSplit:
    """One split, with its own classes and those of other splits with the same type of labels."""
    columns = _find_columns(path, name, tables[name], chosen)
    own = _find_classes(name, tables[name], columns["label"])
    is_named = _has_names(tables[name], columns["label"])
    known = []
    for other, table in tables.items():
        try:
            label = _find_columns(path, other, table, chosen)["label"]
            if _has_names(table, label) == is_named:
                known += _find_classes(other, table, label).values()
        except UserError:  # of a split that is not asked for, such as a test without labels
            continue
    names = list(dict.fromkeys(known)) if is_named else classes.ordered(set(known))
    return HfSplit(name, tables[name], columns=columns, class_names=names, class_of=own)


def _has_names(table: Any, label: str) -> bool:
    return hasattr(table.features[label], "names")


def _find_split_column(path: str, tables: dict[str, Any], chosen: dict[str, str]) -> str:
    """The column that names the splits of a single table; "": none, or several tables."""
    if not _is_divided(tables):
        if "split" in chosen:
            raise UserError(
                f"hf:{path}?split={chosen['split']}: it has the splits {', '.join(tables)}; a "
                "column is for data with 'train' only."
            )
        return ""
    (only, table) = next(iter(tables.items()))
    if "split" in chosen:
        if chosen["split"] and chosen["split"] not in table.features:
            raise unknown(f"column of hf:{path}", chosen["split"], table.features)
        return chosen["split"]
    used = _find_columns(path, only, table, chosen).values()
    values = {name: _few_values(table, name) for name in table.features if name not in used}
    return split_roles.find_column(f"hf:{path}", f"hf:{path}?split=", values)


def _few_values(table: Any, column: str) -> set[str]:
    """Different values of a column of texts, numbers or names; none if there are many."""
    import datasets

    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return set(feature.names) if len(feature.names) <= _MAX_SPLITS else set()
    if not isinstance(feature, datasets.Value):
        return set()
    values: set[str] = set()
    for start in range(0, len(table), _BATCH):
        values.update(map(str, table.select_columns([column])[start : start + _BATCH][column]))
        if len(values) > _MAX_SPLITS:
            return set()
    return values


def _column_splits(table: Any, column: str) -> tuple[list[str], str]:
    """The split of every row by a column, and a text that lists the splits."""
    values = table.select_columns([column])[:][column]
    for row, value in enumerate(values):
        # Otherwise the row would silently be in no split.
        if value is None or value == "":
            raise UserError(
                f"Row {row} has nothing in column {column!r}, which names the splits. Fill it, or "
                "write ?split= to divide the rows anew."
            )
    names = getattr(table.features[column], "names", None)
    values = [str(names[value] if names else value) for value in values]
    if role := split_roles.flag_role(column, set(values)):
        values = [split_roles.flag_split(role, value) for value in values]
    splits = split_roles.offered(dict.fromkeys(values))
    return values, f"Splits by column {column!r}: {', '.join(splits)}."


# A run opens several splits of one data set. The tables only map files, so they cost no memory.
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
            if os.path.isdir(path) and config is None and not _has_configs(path):
                _check_all_used(path, datasets.load_dataset_builder(path).config.data_files)
            found = datasets.load_dataset(path, config)
    except UserError:
        raise
    # Types of many libraries: of the hub, of the network, of files in all formats.
    except Exception as error:
        if getattr(error, "errno", None) in STORAGE_ERRNOS:
            raise StorageError(f"Cannot open hf:{source}: {error}") from error
        raise UserError(f"hf:{source} cannot be opened: {error}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _has_configs(path: str) -> bool:
    """Whether the folder's README.md assigns files to splits."""
    try:
        text = pathlib.Path(path, "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"^configs:", text, re.MULTILINE) is not None


def _check_all_used(path: str, data_files: dict[str, list[str]] | None) -> None:
    """Raises `UserError` if `datasets` would leave out files of a folder.

    It finds splits by words such as "train" anywhere in names of files and folders, and then takes
    only files that have one.
    """
    used = {os.path.realpath(name) for names in (data_files or {}).values() for name in names}
    wanted = {_suffix(name) for name in used} - image_files.OTHER_SUFFIXES
    if wanted & set(image_files.suffixes()):
        wanted |= set(image_files.suffixes())
    left = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if _suffix(name) in wanted and os.path.realpath(os.path.join(folder, name)) not in used
    ]
    left = sorted(os.path.relpath(name, path) for name in left)
    left = [name for name in left if not any(part.startswith(".") for part in name.split(os.sep))]
    if left:
        raise UserError(
            f"hf:{path}: {len(left)} of {len(left) + len(used)} files are in none of the splits "
            f"{', '.join(map(str, data_files))}, such as {show(left)}. `datasets` finds "
            "splits by words in the names of files and folders. Use folder:PATH for folders of "
            "classes, or rename the files."
        )


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _find_columns(path: str, split: str, table: Any, chosen: dict[str, str]) -> dict[str, str]:
    """Names of the columns of the image and the label in one split."""
    import datasets

    features = table.features
    usual = {
        "image": [name for name in features if isinstance(features[name], datasets.Image)],
        "label": [name for name in features if isinstance(features[name], datasets.ClassLabel)]
        or [name for name in features if name.lower() in _LABEL_NAMES],
    }
    columns = {}
    for role, names in usual.items():
        if role in chosen and chosen[role] not in features:
            raise unknown(f"column of hf:{path}", chosen[role], features)
        if role not in chosen and len(names) != 1:
            raise UserError(
                f"hf:{path}: split {split!r} has {'several columns' if names else 'no column'} "
                f"that could be the {role}, of {', '.join(features)}; choose one: "
                f"hf:{path}?{role}=COLUMN"
            )
        columns[role] = chosen.get(role) or names[0]
    return columns


def _find_classes(split: str, table: Any, label: str) -> dict[Any, str]:
    """The class of each value of the label; values without names are names themselves."""
    import datasets

    feature = table.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    if not isinstance(feature, datasets.Value):
        raise UserError(
            f"Column {label!r} has not one label per image but {feature}; choose a data set for "
            "image classification, or another column."
        )
    name_of = {value: str(value).strip() for value in table.unique(label) if value is not None}
    missing = [name for name in name_of.values() if not name or name in classes.MISSING]
    if missing:
        raise UserError(
            f"Split {split!r} has rows with the label {missing[0]!r}, which stands for a missing "
            "one. Take out such rows; or, if it is a class, give it another name."
        )
    numbers = {name: classes.whole_number(name) for name in name_of.values()}
    if None not in numbers.values():
        name_of = {value: str(numbers[name]) for value, name in name_of.items()}
    return name_of
