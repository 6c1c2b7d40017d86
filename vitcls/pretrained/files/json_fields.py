"""Typed reading of a checkpoint's JSON files, which come from strangers."""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitcls.errors import UserError

_MAX_BYTES = 64 << 20  # ImageNet-21k's class names take 2 MB
_MAX_SHOWN = 80  # characters of a value


class JsonFields:
    """The fields of one JSON object; every method checks what it returns.

    All methods take `default` for a field that is absent or null, and raise a `UserError` that
    names file, field and value where the value is not of the kind asked for.
    """

    def __init__(self, content: Any, *, path: Path | str):
        """Takes what was parsed. Raises `UserError` if it is no JSON object.

        Args:
          content: The object.
          path: Where it stands, as messages name it.
        """
        self.path = path
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no JSON object.")
        self._content = content

    @classmethod
    def read(cls, path: Path) -> "JsonFields":
        """Reads a file. Raises `UserError` if it holds no JSON object."""
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise UserError(f"{path} has more than {_MAX_BYTES} bytes: not a checkpoint's.")
            text = path.read_text(encoding="utf-8")
            content = json.loads(text, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not readable JSON: {error}.") from error
        return cls(content, path=path)

    def group(self, name: str) -> "JsonFields":
        """The fields of an object inside this one; none where it is absent."""
        return JsonFields(self.any(name, {}), path=f"{self.path}, {name}")

    def __contains__(self, name: str) -> bool:
        return self._content.get(name) is not None

    def any(self, name: str, default: Any = None) -> Any:
        """The value as it is, for fields with several forms."""
        return self._content[name] if name in self else default

    def string(self, name: str, default: str) -> str:
        """A name, not a text."""
        value = self.any(name, default)
        if not isinstance(value, str) or len(value) > _MAX_SHOWN:
            raise self.error(name, f"a string of up to {_MAX_SHOWN} characters")
        return value

    def integer(self, name: str, default: int, *, at_most: int, at_least: int = 1) -> int:
        return self._checked_integer(name, self.any(name, default), at_least, at_most)

    def pair(self, name: str, default: int, *, at_most: int) -> tuple[int, int]:
        """(height, width), from an integer for both or a list of the two."""
        value = self.any(name, default)
        if not isinstance(value, list):
            value = [value, value]
        if len(value) != 2:
            raise self.error(name, "one integer, or [height, width]")
        return tuple(self._checked_integer(name, side, 1, at_most) for side in value)

    def integers(
        self, name: str, default: tuple[int, ...], *, at_most: int, max_length: int
    ) -> tuple[int, ...]:
        """1 to `max_length` integers from 1 to `at_most`."""
        value = self.any(name, list(default))
        if not isinstance(value, list) or not 1 <= len(value) <= max_length:
            raise self.error(name, f"a list of 1 to {max_length} integers")
        return tuple(self._checked_integer(name, item, 1, at_most) for item in value)

    def number(self, name: str, default: float) -> float:
        """A finite, non-negative number."""
        value = self.any(name, default)
        if not is_number(value) or value < 0:
            raise self.error(name, "a non-negative number")
        return float(value)

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """As many finite numbers as `default` has."""
        value = self.any(name, list(default))
        if not (
            isinstance(value, list) and len(value) == len(default) and all(map(is_number, value))
        ):
            raise self.error(name, f"a list of {len(default)} numbers")
        return tuple(map(float, value))

    def boolean(self, name: str, default: bool) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, default: Any, table: Mapping[Any, Any]) -> Any:
        """The entry of `table` under the field's value."""
        value = self.any(name, default)
        if type(value) not in (str, int) or value not in table:
            raise self.error(name, "one of " + ", ".join(map(str, table)))
        return table[value]

    def error(self, name: str, allowed: str) -> UserError:
        # Piece by piece: the value may be long, or nested deeper than Python can follow.
        pieces = itertools.islice(json.JSONEncoder().iterencode(self.any(name)), _MAX_SHOWN)
        value = "".join(pieces)
        value = value if len(value) < _MAX_SHOWN else value[:_MAX_SHOWN] + "..."
        return UserError(f"{self.path}: {name}={value} is not supported; it must be {allowed}.")

    def _checked_integer(self, name: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"an integer from {low} to {high}")
        return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two values under one key, Python would take the last silently."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:_MAX_SHOWN]!r} is there twice")
    return content


def is_number(value: Any) -> bool:
    """Whether it is finite, and integers within the range of floats."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
