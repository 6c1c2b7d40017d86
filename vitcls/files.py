"""Files that are whole or absent, through kills and power losses: written aside, synced, renamed.

Launchers use it: it imports no jax.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitcls.errors import StorageError, UserError

log = logging.getLogger("vitcls")

# Errors of file systems that cannot sync a folder.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


def expand(path: str | Path) -> Path:
    """Returns the path with the home folder in place of `~`.

    Raises:
      UserError: the home folder does not exist.
    """
    expanded = Path(os.path.expanduser(path))
    if str(expanded).startswith("~"):
        raise UserError(f"{path} cannot be used: its ~ has no home folder.")
    return expanded


def make_folder(folder: Path, *, flag: str = "--workdir") -> None:
    """Makes the folder of a flag; raises `UserError` or `StorageError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{flag}={folder} cannot be made: {error.strerror}.") from error
    except OSError as error:
        raise StorageError(f"{flag}={folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={folder} cannot be written to; name another.")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it is renamed to `path` on success and deleted on failure."""
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(output: str | Path, *, flag: str = "--output") -> Iterator[Path]:
    """Yields a temporary folder, renamed to `output` on success and deleted on failure.

    Args:
      output: New, or an empty folder.
      flag: The flag whose value it is; "": none.

    Raises:
      UserError: the folder is in use, or cannot be made.
    """
    directory = expand(output).resolve()
    named = f"{flag}={output}" if flag else str(output)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{named} exists and is not an empty folder; name another.")
    # In the nearest folder that exists: missing parents are made at the end, so a failure leaves
    # none behind.
    home = next(folder for folder in directory.parents if folder.exists())
    aside = home / f".{directory.name}.{os.getpid()}.tmp"
    try:
        try:
            aside.mkdir()
        except (NotADirectoryError, PermissionError) as error:
            raise UserError(f"{named} cannot be made: {error.strerror}.") from error
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk itself."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as indented JSON, so that the file is always whole."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, *, remedy: str, what: str = "") -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
      path: The file.
      remedy: What the user can do if it cannot be read; ends the message.
      what: What the file is, for the message.

    Raises:
      UserError: it is missing, or empty, cut, or not an object, as after a power loss.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, OSError) as error:
        named = f"{path}, {what}," if what else path
        raise UserError(f"{named} cannot be read ({error}): {remedy}.") from error
    return content


def read_or_set_aside(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file that can be made again; None if it cannot be read.

    A file that cannot be read is renamed to `NAME.unreadable`, with a warning.
    """
    if not path.exists():
        return None
    aside = path.with_name(f"{path.name}.unreadable")
    try:
        return read_json(path, remedy=f"it is made again, and kept as {aside.name}")
    except UserError as error:
        log.warning("%s", error)
        # Another process of the run may have been first.
        with contextlib.suppress(FileNotFoundError):
            path.replace(aside)
        return None
