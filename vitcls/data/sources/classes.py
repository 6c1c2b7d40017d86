"""Classes by their names: their order, and their positions among other classes.

K classes.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitcls.data.sources.split import Split
from vitcls.errors import UserError

# Texts and numbers that stand for a missing label, mostly those of pandas.
MISSING = frozenset(
    (
        "#N/A", "#N/A N/A", "#NA", "-1", "-1.0", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
        "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
    )
)  # fmt: skip
log = logging.getLogger("vitcls")

_NUMBER = re.compile(r"([0-9]+)(\.0*)?")
_MAX_SHOWN = 5


def whole_number(name: str) -> int | None:
    """The number that a name stands for, as in "7", "07" and "7.0"; None: it is a text."""
    match = _NUMBER.fullmatch(name)
    return int(match[1]) if match else None


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of their labels: whole numbers by their value, otherwise as text."""
    names = list(names)
    if all(whole_number(name) is not None for name in names):
        return sorted(names, key=lambda name: (whole_number(name), name))
    return sorted(names)


def match(class_names: Sequence[str], model_names: Sequence[str], *, by: str) -> np.ndarray:
    """Returns the position of each of the data's classes among the model's, integers.

    Args:
      class_names: The data's.
      model_names: The model's, which may have more.
      by: "name"; or "index": the data's classes are the model's in its order, and names that are
        whole numbers below its number of classes are positions.

    Raises:
      UserError: they do not match; it shows both.
    """
    if by == "index":
        return _match_by_index(tuple(class_names), tuple(model_names))
    try:
        return match_names(class_names, model_names)
    except UserError as error:
        raise UserError(
            f"--labels=name: {error} If they are the same in the same order under other names, use "
            "--labels=index; otherwise choose other data or another checkpoint."
        ) from error


def match_names(class_names: Sequence[str], model_names: Sequence[str]) -> np.ndarray:
    """`match` by name, for commands without --labels: the message names no flag."""
    class_names, model_names = tuple(class_names), tuple(model_names)
    if class_names == model_names:
        return np.arange(len(class_names))
    counts, own = Counter(model_names), Counter(class_names)
    unclear = [name for name in class_names if counts[name] != 1 or own[name] != 1]
    if unclear:
        raise UserError(
            f"{len(unclear)} of the data's classes, such as {unclear[0]!r}, cannot be matched to "
            f"exactly one of the checkpoint's: {_show_both(class_names, model_names)}"
        )
    return np.array([model_names.index(name) for name in class_names])


def _match_by_index(class_names: tuple[str, ...], model_names: tuple[str, ...]) -> np.ndarray:
    if class_names == model_names:
        return np.arange(len(class_names))
    both = _show_both(class_names, model_names)
    if moved := find_moved(class_names, model_names):
        raise UserError(
            f"--labels=index: {moved[0]!r} is in the data and in the checkpoint, but in another "
            f"place: {both} Use --labels=name."
        )
    numbers = [whole_number(name) for name in class_names]
    if (
        None not in numbers
        and max(numbers) < len(model_names)
        and len(set(numbers)) == len(numbers)
    ):
        return np.array(numbers)
    if len(class_names) != len(model_names):
        raise UserError(
            f"--labels=index needs the same number of classes: {both} Use --labels=name."
        )
    return np.arange(len(class_names))


def find_moved(class_names: Sequence[str], model_names: Sequence[str]) -> list[str]:
    """Names that both have, but at different positions, which `by="index"` would confuse."""
    known = set(model_names)
    return [
        name
        for position, name in enumerate(class_names)
        if name in known and (position >= len(model_names) or model_names[position] != name)
    ]


def _show_both(class_names: tuple[str, ...], model_names: tuple[str, ...]) -> str:
    both = f"{_show('the data has', class_names)}; {_show('the checkpoint has', model_names)}."
    return both + other_forms(class_names, model_names)


def other_forms(names: Iterable[str], others: Iterable[str]) -> str:
    """A sentence on the first name that looks like another one but is spelt otherwise, or "".

    Unicode has two forms of accented letters, for example. macOS writes NFD in the names of folders
    and archives; most other systems write NFC.
    """
    names, others = set(names), set(others)
    by_form = {unicodedata.normalize("NFC", other): other for other in sorted(others - names)}
    for name in sorted(names - others):
        other = by_form.get(unicodedata.normalize("NFC", name))
        if other is not None:
            one, form = _form(name), _form(other)
            return (
                f" {name!r} is in both, but in two Unicode forms: {name!a} ({one}) and "
                f"{other!a} ({form}). Rename the first to the second, for example with "
                f"unicodedata.normalize({form!r}, name) in Python."
            )
    return ""


def _form(name: str) -> str:
    return "NFC" if unicodedata.is_normalized("NFC", name) else "NFD"


def _show(whose: str, names: tuple[str, ...]) -> str:
    listed = ", ".join(map(repr, names[:_MAX_SHOWN]))
    return f"{whose} {len(names)} ({listed}{', ...' if len(names) > _MAX_SHOWN else ''})"


def check_kept(kept: tuple[str, ...], class_names: tuple[str, ...], *, num_classes: int) -> None:
    """Raises `UserError` if a head that is kept has other classes than the data, or another order.

    Classes are matched by position, so that names may differ; a warning says so.

    Args:
      kept: The checkpoint's class names.
      class_names: The data's.
      num_classes: Number of outputs of the head.
    """
    if num_classes != len(class_names):
        raise UserError(
            f"model.head='keep' keeps {num_classes} classes, but the data has "
            f"{len(class_names)}; use model.head='new'."
        )
    if moved := find_moved(class_names, kept):
        raise UserError(
            "model.head='keep': the checkpoint has the data's classes in another order, such as "
            f"{moved[0]!r}: {kept[:5]} ... there, {class_names[:5]} ... in the data. Use "
            "model.head='new'."
        )
    if kept != class_names:
        log.warning(
            "model.head='keep': class names differ (%s ... kept, %s ... in the data); classes are "
            "matched by position.", kept[:3], class_names[:3],
        )  # fmt: skip


def align(train: Split, other: Split) -> Split:
    """Returns `other` with labels that mean the same as those of `train`.

    Raises:
      UserError: it has classes that `train` lacks.
    """
    if other.class_names == train.class_names:
        return other
    added = sorted(set(other.class_names) - set(train.class_names))
    missing = sorted(set(train.class_names) - set(other.class_names))
    if added or len(set(other.class_names)) < len(other.class_names):
        raise UserError(
            f"Split {other.name!r} has other classes than {train.name!r}: {missing[:_MAX_SHOWN]} "
            f"are missing, {added[:_MAX_SHOWN]} are new. Labels would not mean the same; give both "
            f"the same classes.{other_forms(added, missing)}"
        )
    if missing:
        log.warning(
            "Split %r has no images of %d of the %d classes: %s.",
            other.name, len(missing), len(train.class_names), ", ".join(missing[:_MAX_SHOWN]),
        )  # fmt: skip
    return Relabelled(other, train.class_names)


class Relabelled(Split):
    """A split whose labels are positions among the classes of another one."""

    def __init__(self, parent: Split, class_names: Sequence[str]):
        """Takes a split and the other class names, which include all of its own."""
        self.name, self.class_names = parent.name, tuple(class_names)
        self.fingerprint = parent.fingerprint
        self._parent = parent
        self._positions = np.array([self.class_names.index(name) for name in parent.class_names])

    def __len__(self) -> int:
        return len(self._parent)

    def read(self, index: int) -> tuple[bytes, int]:
        """See `Split`."""
        data, label = self._parent.read(index)
        return data, self._label(label)

    def image(self, index: int) -> tuple[Image.Image, int]:
        """See `Split`."""
        image, label = self._parent.image(index)
        return image, self._label(label)

    def _label(self, label: int) -> int:
        # A label that is not a class becomes -1: the loader raises the error.
        return int(self._positions[label]) if 0 <= label < len(self._positions) else -1

    def id(self, index: int) -> str:
        """See `Split`."""
        return self._parent.id(index)

    def hashes(self) -> np.ndarray:
        """See `Split`."""
        return self._parent.hashes()

    def labels(self) -> np.ndarray:
        """See `Split`."""
        return self._positions[self._parent.labels()].astype(np.int32)

    def fill_cache(self, *, num_threads: int) -> None:
        """See `Split`."""
        self._parent.fill_cache(num_threads=num_threads)

    def origin(self) -> dict[str, Any]:
        """See `Split`."""
        return self._parent.origin()
