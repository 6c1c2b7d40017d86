"""The lock of a folder that one process at a time may write to.

It is one of the operating system, which takes it back however the process ends, so that none is
left behind; NFS passes it on to other hosts. The file says who holds it, and stays.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from vitcls.errors import UserError

log = logging.getLogger("vitcls")

# A process loses its lock when it closes any descriptor of the file: so there is one of each.
_HELD: dict[Path, TextIO] = {}
_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def take(path: Path) -> None:
    """Takes the lock at `path` for this process, which may hold it already.

    Raises:
      UserError: another process holds it.
    """
    path = path.resolve()
    if path in _HELD:
        return
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(
                f"{path.parent} is being written to by {_holder(file.read())}. Wait until it ends, "
                "stop it, or use another --workdir."
            ) from error
        if error.errno not in _UNKNOWN:
            raise
        log.warning(
            "%s is on a file system without locks (%s): see to it that no other job has the same "
            "--workdir.", path.parent, error.strerror,
        )  # fmt: skip
    _HELD[path] = file
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    file.truncate(0)
    file.write(json.dumps(holder) + "\n")
    file.flush()


def release(path: Path) -> None:
    """Gives the lock back, if this process holds it."""
    if file := _HELD.pop(path.resolve(), None):
        file.close()


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']}, since {since}"
    except (ValueError, KeyError, TypeError):  # it is just writing this down
        return "another process"
