"""File locks, held by one process at a time: for workdirs, caches, data sets and lists.

The operating system releases them when the process ends, even if it is killed. On a file system
without locks, there is one warning and work continues without them. The file stays: deleting it
would let two processes in.

The library `filelock` does not suffice. Without locks in the file system it fails (ENOLCK, ENOTSUP)
or leaves a file behind when it is killed (ENOSYS). It also hides the open file, through which a
process that prepares data inherits the lock.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TextIO

from vitcls.errors import UserError
from vitcls.logs.progress import doing

log = logging.getLogger("vitcls")

# A process loses its lock when it closes any descriptor of the file, so each file is opened once.
_HELD: dict[Path, TextIO] = {}
_MISSING = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_WARNED: set[int] = set()  # numbers of file systems


def take(path: Path, *, verb: str = "written to") -> None:
    """Takes the lock at `path` for this process, which may hold it already.

    Args:
      path: The file; its folder is what the message names.
      verb: How another holder of the lock uses the folder, for the message.

    Raises:
      UserError: another process holds it.
    """
    path = path.resolve()
    if path in _HELD:
        return
    file = path.open("a+")
    # NFS passes this kind on to other hosts, and child processes do not inherit it.
    if _lock(file, fcntl.lockf, fcntl.LOCK_NB) is False:
        with file:
            raise UserError(
                f"{path.parent} is being {verb} by {_holder(file)}. Wait until it ends, "
                "stop it, or use another --workdir."
            )
    _HELD[path] = file
    _write_holder(file)


def release(path: Path) -> None:
    """Gives the lock back, if this process holds it."""
    if file := _HELD.pop(path.resolve(), None):
        file.close()


@contextlib.contextmanager
def waiting(path: Path) -> Iterator[tuple[TextIO, bool]]:
    """Makes the folder of `path`, waits for the lock there, and holds it.

    Yields:
      The open file, through which a child process inherits the lock; and whether this process is
      known to be alone. Without locks it is not.

    Raises:
      OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        is_alone = wait_for(file, log_as=f"prepares {path.parent}")
        _write_holder(file)
        yield file, is_alone


def wait_for(file: IO, *, log_as: str = "") -> bool:
    """Locks an open file until it is closed, in this process and in all that inherit it.

    Args:
      file: Open to write.
      log_as: The other process' work, for the log; "": no message.

    Returns:
      Whether there are locks.
    """
    is_locked = _lock(file, fcntl.flock, fcntl.LOCK_NB)
    if is_locked is not False:
        return bool(is_locked)
    if not log_as:
        return bool(_lock(file, fcntl.flock))
    message = f"Waiting for {_holder(file)}, which {log_as}."
    log.info("%s", message)
    with doing(message):
        return bool(_lock(file, fcntl.flock))


def _lock(file: IO, call: Callable[[IO, int], None], how: int = 0) -> bool | None:
    """Whether the file is locked now; None: its file system has no locks."""
    try:
        call(file, fcntl.LOCK_EX | how)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _MISSING:
            raise
        _warn(Path(file.name).parent, error)
        return None
    return True


def _warn(folder: Path, error: OSError) -> None:
    if (device := folder.stat().st_dev) not in _WARNED:
        _WARNED.add(device)
        log.warning(
            "%s is on a file system without locks (%s): make sure that no other job has the same "
            "workdir. Several processes may prepare the same data or cache.",
            folder, error.strerror,
        )  # fmt: skip


def _write_holder(file: TextIO) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    file.truncate(0)
    file.write(json.dumps(holder) + "\n")
    file.flush()


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']}, since {since}"
    except (ValueError, KeyError, TypeError):  # it has not written this yet
        return "another process"
