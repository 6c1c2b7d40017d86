"""Checks that a command replaces only files that it has written itself.

The file that a command writes first identifies it, so an interrupted command is also recognised.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from vitcls.errors import UserError


def check(
    flag: str, folder: Path, names: Sequence[str], *, is_own: Callable[[], bool] = lambda: False
) -> None:
    """Raises `UserError` if a command would overwrite files that it has not written.

    Args:
      flag: The flag that names the folder, or a file in it.
      folder: Need not exist.
      names: Files that the command writes there. Empty files and folders may be replaced.
      is_own: Whether an earlier call of the command wrote them; called only if one exists.
    """
    found = [name for name in names if _holds_something(folder / name)]
    if found and not is_own():
        raise UserError(
            f"{flag}: {folder} holds {', '.join(found)}, which this command has not written and "
            "would overwrite. Name another place, or move that away."
        )


def check_file(flag: str, path: Path, *, is_own: Callable[[], bool]) -> None:
    """The same for a command that writes one file."""
    check(flag, path.parent, [path.name], is_own=is_own)


def has_keys(path: Path, *keys: str) -> bool:
    """Whether a JSON file, or the first line of JSON lines, is an object with these keys."""
    try:
        with path.open(encoding="utf-8") as file:
            content = json.loads(file.readline() if path.suffix == ".jsonl" else file.read())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)


def has_text(path: Path, text: str, *, at_start: bool = False) -> bool:
    """Whether a file holds, or begins with, this text."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return text in file.read(len(text) if at_start else -1)
    except OSError:
        return False


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.is_symlink() or (path.exists() and path.stat().st_size > 0)
