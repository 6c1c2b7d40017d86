"""Images listed in a CSV file: `csv:PATH`, or `csv:PATH?image=COLUMN&label=COLUMN&split=COLUMN`.

The first line has the names of the columns, in any case; those that are not given in the source are
found by the names in `_COLUMNS`. Paths are relative to the file's folder. Labels are names of
classes, ordered as text; or, if all are whole numbers, numbers of classes from 0 on. Within a class
images are ordered by path, as in a folder: the order of the lines means nothing.
"""

import collections
import concurrent.futures
import csv
import hashlib
import os
import stat
from collections.abc import Collection
from typing import NamedTuple

from vitcls.data.files_split import NUM_THREADS, FilesSplit, divide, show
from vitcls.data.split import Split
from vitcls.errors import StorageError, UserError, unknown

_COLUMNS = {
    "image": (
        "image", "image_path", "img", "img_path", "path", "file", "file_name", "filename",
        "file_path", "filepath",
    ),
    "label": ("label", "labels", "class", "class_name", "category", "target"),
    "split": ("split", "subset", "partition"),
}  # fmt: skip
_DELIMITERS = ",;\t"


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


class CsvSplit(FilesSplit):
    """The images of one split, or of all."""

    def __init__(self, path: str, name: str, *, rows: list[_Row], class_names: tuple[str, ...]):
        """Asks the file system for the size of every image, and so whether it is there.

        Raises:
          UserError: Some are not.
        """
        root = os.path.dirname(path)
        with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
            sizes = list(pool.map(lambda row: _size(os.path.join(root, row.path)), rows))
        missing = [row for row, size in zip(rows, sizes, strict=True) if size is None]
        if missing:
            raise UserError(
                f"{path}, line {missing[0].line}: there is no image {missing[0].path!r} in {root}; "
                f"{len(missing)} of {len(rows)} images are missing. Paths are relative to the CSV "
                "file's folder."
            )
        listings = {name: [] for name in class_names}
        for row, size in zip(rows, sizes, strict=True):
            listings[row.label].append((row.path, size))
        listings = [sorted(listing) for listing in listings.values()]
        super().__init__(root, name, class_names=class_names, listings=listings)
        # Here paths do not tell the labels.
        digest = hashlib.sha256(self.fingerprint.encode() + self._labels.astype("<i4").tobytes())
        self.fingerprint = digest.hexdigest()


def open_csv(source: str, split: str) -> Split:
    """Opens a split of the images listed in a CSV file.

    With a column of splits, these are the splits. Without, there are `train` and `test`: of every
    class a fifth, always the same, is the test split.

    Args:
      source: PATH, optionally with `?image=COLUMN&label=COLUMN&split=COLUMN` or some of these.
      split: Its name.

    Raises:
      UserError: No such file, column, split or image, or lines that cannot be used.
    """
    path, rows = _read(source)
    classes = _find_classes(path, rows)
    class_names = tuple(dict.fromkeys(classes.values()))
    rows = [row._replace(label=classes[row.label]) for row in rows]
    names = _split_names(rows)
    if names:
        if split not in names:
            raise unknown(f"split of {path}", split, names)
        rows = [row for row in rows if row.split == split]
        return CsvSplit(path, split, rows=rows, class_names=class_names)
    if split not in ("train", "test"):
        raise UserError(
            f"{path} has no column of splits, and so is divided into 'train' and 'test'; there is "
            f"no {split!r}. Add a column called 'split'."
        )
    return divide(CsvSplit(path, "all", rows=rows, class_names=class_names), split)


def csv_split_names(source: str) -> list[str]:
    """Names of the splits that `open_csv` opens."""
    return _split_names(_read(source)[1]) or ["train", "test"]


def _split_names(rows: list[_Row]) -> list[str]:
    return list(dict.fromkeys(row.split for row in rows if row.split))


def _read(source: str) -> tuple[str, list[_Row]]:
    """The file's full path and its lines, of which no two name the same image."""
    path, _, query = source.partition("?")
    if not path:
        raise UserError("data.source='csv:' names no file; csv:PATH, for example.")
    path = os.path.abspath(os.path.expanduser(path))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = _read_rows(path, file, query)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8: {error}.") from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"data.source: {path} cannot be read: {error.strerror}.") from error
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}.") from error
    if not rows:
        raise UserError(f"{path} lists no images; write one per line below the column names.")
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(row.path, row.line)
        if first != row.line:
            raise UserError(
                f"{path}, line {row.line}: {row.path!r} is already in line {first}; list each "
                "image once, with one label and in one split."
            )
    return path, rows


def _read_rows(path: str, file, query: str) -> list[_Row]:
    header = file.readline()
    delimiter = max(_DELIMITERS, key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    columns = _find_columns(path, names, query)
    rows = []
    reader = csv.reader(file, delimiter=delimiter)
    for cells in reader:
        line = reader.line_num + 1  # the header was read apart
        if not cells:
            continue
        if len(cells) != len(names):
            raise UserError(
                f"{path}, line {line} has {len(cells)} cells, but there are {len(names)} columns; "
                f"cells that contain {delimiter!r} need quotes."
            )
        values = {}
        for role, column in columns.items():
            values[role] = cells[column].strip()
            if not values[role]:
                raise UserError(f"{path}, line {line}: column {names[column]!r} is empty; fill it.")
        image = os.path.normpath(values["image"])
        rows.append(_Row(line, image, values["label"], values.get("split", "")))
    return rows


def _find_columns(path: str, names: list[str], query: str) -> dict[str, int]:
    """Positions of the columns "image", "label" and, where there is one, "split"."""
    positions = collections.defaultdict(list)
    for position, name in enumerate(names):
        positions[name.lower()].append(position)
    chosen = parse_columns(f"csv:{path}", query, _COLUMNS)
    columns = {}
    for role, usual in _COLUMNS.items():
        wanted = (chosen[role],) if role in chosen else usual
        found = [position for name in wanted for position in positions[name.lower()]]
        if len(found) == 1:
            columns[role] = found[0]
        elif found:
            raise UserError(
                f"{path}: columns {show([repr(names[column]) for column in found])} could all be "
                f"the {role}; choose one: csv:PATH?{role}={names[found[0]]}"
            )
        elif role in chosen:
            raise unknown(f"column of {path}", chosen[role], names)
        elif role != "split":
            raise UserError(
                f"{path} has no column called {', '.join(usual)}, but {', '.join(names)}; say "
                f"which one is the {role}: csv:PATH?{role}=COLUMN"
            )
    return columns


def parse_columns(source: str, query: str, roles: Collection[str]) -> dict[str, str]:
    """Reads what follows the "?" of a source, `role=COLUMN&role=COLUMN`."""
    chosen = {}
    for item in filter(None, query.split("&")):
        role, _, column = item.partition("=")
        if role not in roles:
            raise unknown(f"column option of {source}", role, roles)
        chosen[role] = column
    return chosen


def _find_classes(path: str, rows: list[_Row]) -> dict[str, str]:
    """The class of each label, in the classes' order; "07" and "7" are the same number."""
    first_lines: dict[str, int] = {}
    for row in rows:
        first_lines.setdefault(row.label, row.line)
    if all(label.isdecimal() for label in first_lines):
        classes = {label: str(int(label)) for label in sorted(first_lines, key=int)}
        # A class that nothing shows could not be learned, and a stray number would be one.
        label_of = {name: label for label, name in classes.items()}
        for expected, (name, label) in enumerate(label_of.items()):
            if name != str(expected):
                raise UserError(
                    f"{path}, line {first_lines[label]}: label {label}, but no image has label "
                    f"{expected}. Number the classes from 0 without gaps, or write names."
                )
    else:
        classes = {label: label for label in sorted(first_lines)}
    if len(set(classes.values())) < 2:
        raise UserError(f"{path} has one class only, {rows[0].label!r}; there must be two or more.")
    return classes


def _size(path: str) -> int | None:
    """Bytes of the file; None if there is none."""
    try:
        status = os.stat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name of a file
        return None
    except OSError as error:
        raise StorageError(f"Cannot find {path}: {error.strerror}.") from error
