"""Images listed in a CSV file: `csv:PATH`, or `csv:PATH?image=COLUMN&label=COLUMN&split=COLUMN`.

The first line has the names of the columns, in any case. Columns that the source does not name are
found by the names in `COLUMNS`, and the column of splits also by its values. An empty `split=`
divides the images anew. Paths are relative to the file's folder. Labels are names of classes,
ordered as text, or numbers from 0 on if all are whole numbers. Within a class images are ordered by
path, as in a folder: the order of the lines means nothing.
"""

import collections
import concurrent.futures
import csv
import hashlib
import os
import stat
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from vitcls.data.sources import classes, split_roles
from vitcls.data.sources.files import NUM_THREADS, FilesSplit, divide, show
from vitcls.data.sources.split import Split
from vitcls.errors import StorageError, UserError, unknown

# Usual names of columns, in lower case; those of splits are in `vitcls.data.sources.split_roles`.
COLUMNS = {
    "image": (
        "image", "image_path", "img", "img_path", "path", "file", "file_name", "filename",
        "file_path", "filepath",
    ),
    "label": ("label", "labels", "class", "class_name", "category", "target"),
}  # fmt: skip
_ROLES = (*COLUMNS, "split")
# A column with more different values does not name splits.
_MAX_SPLITS = 20
_DELIMITERS = ",;\t"


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


class _Table(NamedTuple):
    """A file's lines, and how it is divided, in one line of text."""

    path: str
    rows: list[_Row]
    found: str


class CsvSplit(FilesSplit):
    """The images of one split, or all images."""

    def __init__(self, path: str, name: str, *, rows: list[_Row], class_names: tuple[str, ...]):
        """Reads the size of every image from the file system.

        Raises:
          UserError: Images are missing.
        """
        root = os.path.dirname(path)
        with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
            sizes = list(pool.map(lambda row: _size(os.path.join(root, row.path)), rows))
        missing = [row for row, size in zip(rows, sizes, strict=True) if size is None]
        if missing:
            raise UserError(
                f"{path}, line {missing[0].line}: {missing[0].path!r} is not a file in {root}; "
                f"{len(missing)} of {len(rows)} images are missing. Paths are relative to the CSV "
                "file's folder."
            )
        listings = {name: [] for name in class_names}
        for row, size in zip(rows, sizes, strict=True):
            listings[row.label].append((row.path, size))
        listings = [sorted(listing) for listing in listings.values()]
        super().__init__(root, name, class_names=class_names, listings=listings)
        # Unlike in folders, paths do not tell the labels.
        digest = hashlib.sha256(self.fingerprint.encode() + self._labels.astype("<i4").tobytes())
        self.fingerprint = digest.hexdigest()


def open_csv(source: str, split: str) -> Split:
    """Opens a split of the images listed in a CSV file.

    A column of splits names the splits. Without it, there are `train` and `test`: the test split is
    a fifth of every class, always the same.

    Args:
      source: PATH, optionally with `?image=COLUMN&label=COLUMN&split=COLUMN` or some of these.
      split: Its name.

    Raises:
      UserError: No such file, column, split or image, or lines that cannot be used.
    """
    path, rows, found = _read(source)
    class_of = _find_classes(path, rows)
    class_names = tuple(dict.fromkeys(class_of.values()))
    rows = [row._replace(label=class_of[row.label]) for row in rows]
    names = _split_names(rows)
    if names:
        name = split_roles.find(f"split of {path}", split, names)
        rows = [row for row in rows if row.split == name]
        opened = CsvSplit(path, split, rows=rows, class_names=class_names)
    elif split not in ("train", "test"):
        raise UserError(
            f"{path} has no column of splits, and so is divided into 'train' and 'test'; there is "
            f"no {split!r}. Add a column named 'split'."
        )
    else:
        opened = divide(CsvSplit(path, "all", rows=rows, class_names=class_names), split)
    lacking = [opened.class_names[k] for k in np.flatnonzero(opened.class_counts() == 0)]
    opened.found = (
        f"{found} {len(opened)} images of {len(class_names)} classes, listed in {path}."
        + (f" No images of {show(lacking)}." if lacking else "")
    )
    return opened


def csv_split_names(source: str) -> list[str]:
    """Names of the splits that `open_csv` opens."""
    return list(split_roles.offered(_split_names(_read(source).rows))) or ["train", "test"]


def _split_names(rows: list[_Row]) -> list[str]:
    return list(dict.fromkeys(row.split for row in rows if row.split))


def _read(source: str) -> _Table:
    """The file's lines; each names another image."""
    path, _, query = source.partition("?")
    if not path:
        raise UserError("data.source='csv:' names no file; csv:PATH, for example.")
    path = os.path.abspath(os.path.expanduser(path))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows, found = _read_rows(path, file, query)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}.") from error
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
    return _Table(path, rows, found)


def _read_rows(path: str, file, query: str) -> tuple[list[_Row], str]:
    header = file.readline()
    delimiter = max(_DELIMITERS, key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    chosen = parse_columns(f"csv:{path}", query, _ROLES)
    columns = _find_columns(path, names, chosen)
    lines = []
    reader = csv.reader(file, delimiter=delimiter)
    for cells in reader:
        line = reader.line_num + 1  # the header was read before
        if not cells:
            continue
        if len(cells) != len(names):
            raise UserError(
                f"{path}, line {line} has {len(cells)} cells, but there are {len(names)} columns; "
                f"cells that contain {delimiter!r} need quotes."
            )
        lines.append((line, [cell.strip() for cell in cells]))
    others = [column for column in range(len(names)) if column not in columns.values()]
    if "split" not in chosen:
        values = {names[column]: _few_values(lines, column) for column in others}
        if split := split_roles.find_column(path, "csv:PATH?split=", values):
            columns["split"] = names.index(split)
    rows = [_make_row(path, names, columns, line, cells) for line, cells in lines]
    if "split" in columns:
        rows, how = _with_splits(path, names[columns["split"]], rows)
    else:
        how = "No column of splits"
        if others:
            how += f" among {show([names[column] for column in others])}"
        how += ": a fifth of every class is 'test'."
    return rows, how


def _few_values(lines: list[tuple[int, list[str]]], column: int) -> set[str]:
    """Different values of a column; none if there are many."""
    values = set()
    for _, cells in lines:
        values.add(cells[column])
        if len(values) > _MAX_SPLITS:
            return set()
    return values


def _make_row(
    path: str, names: list[str], columns: dict[str, int], line: int, cells: list[str]
) -> _Row:
    values = {role: cells[column] for role, column in columns.items()}
    for role, value in values.items():
        if not value:
            raise UserError(
                f"{path}, line {line}: column {names[columns[role]]!r} is empty; fill it."
            )
    if values["label"] in classes.MISSING:
        raise UserError(
            f"{path}, line {line}: label {values['label']!r} stands for a missing one. Remove such "
            "lines; or, if it is a class, give it another name."
        )
    image = os.path.normpath(values["image"])
    return _Row(line, image, values["label"], values.get("split", ""))


def _with_splits(path: str, column: str, rows: list[_Row]) -> tuple[list[_Row], str]:
    """The rows with the names of their splits, and a text that lists these."""
    values = dict.fromkeys(row.split for row in rows)
    if role := split_roles.flag_role(column, values):
        rows = [row._replace(split=split_roles.flag_split(role, row.split)) for row in rows]
        values = dict.fromkeys(row.split for row in rows)
    spellings = collections.defaultdict(list)
    for value in values:
        spellings[value.casefold()].append(value)
    for same in spellings.values():
        if len(same) > 1:
            raise UserError(
                f"{path}: column {column!r} has {show(sorted(map(repr, same)))}, which differ in "
                "case only. Write one of them everywhere."
            )
    return rows, f"Splits by column {column!r}: {', '.join(split_roles.offered(values))}."


def _find_columns(path: str, names: list[str], chosen: dict[str, str]) -> dict[str, int]:
    """Positions of the columns "image", "label" and, if one is chosen, "split"."""
    positions = collections.defaultdict(list)
    for position, name in enumerate(names):
        positions[name.lower()].append(position)
    columns = {}
    for role in _ROLES:
        usual = COLUMNS.get(role, ())
        if role == "split" and not chosen.get(role):
            continue
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
        else:
            raise UserError(
                f"{path} has no column called {', '.join(usual)}, but {', '.join(names)}; say "
                f"which one is the {role}: csv:PATH?{role}=COLUMN"
            )
    return columns


def parse_columns(source: str, query: str, roles: Collection[str]) -> dict[str, str]:
    """Reads the part of a source after "?", `role=COLUMN&role=COLUMN`."""
    chosen = {}
    for item in filter(None, query.split("&")):
        role, _, column = item.partition("=")
        if role not in roles:
            raise unknown(f"column option of {source}", role, roles)
        chosen[role] = column
    return chosen


def _find_classes(path: str, rows: list[_Row]) -> dict[str, str]:
    """The class of each label, in order of the classes; "07", "7" and "7.0" are one number."""
    first_lines: dict[str, int] = {}
    for row in rows:
        first_lines.setdefault(row.label, row.line)
    numbers = {label: classes.whole_number(label) for label in classes.ordered(first_lines)}
    if None not in numbers.values():
        class_of = {label: str(number) for label, number in numbers.items()}
        # A stray number would add classes without images, which cannot be learned.
        label_of = {name: label for label, name in class_of.items()}
        for expected, (name, label) in enumerate(label_of.items()):
            if name != str(expected):
                raise UserError(
                    f"{path}, line {first_lines[label]}: label {label}, but no image has label "
                    f"{expected}. Number the classes from 0 without gaps, or write names."
                )
    else:
        class_of = {label: label for label in numbers}
    if len(set(class_of.values())) < 2:
        raise UserError(f"{path} has one class only, {rows[0].label!r}; there must be two or more.")
    return class_of


def _size(path: str) -> int | None:
    """Bytes of the file; None if there is none."""
    try:
        status = os.stat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a file name
        return None
    except OSError as error:
        raise StorageError(f"Cannot find {path}: {error.strerror}.") from error
