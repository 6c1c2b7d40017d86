"""The errors that end a command with a message instead of a traceback."""

import difflib
import errno
from collections.abc import Iterable

# Errors of the file system that no change of the command line would fix.
STORAGE_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.EFBIG,
}  # fmt: skip

# Exit code of a process that its watchdog ended.
STALLED = 86


class UserError(ValueError):
    """Something the user can fix: a flag, a config field, a file. Names it and says what to do."""

    exit_code = 2


class NotFinite(UserError):
    """A checkpoint's network answers with nan or infinity: its metrics would mean nothing."""


class Unavailable(RuntimeError):
    """No device, or no port at which processes meet; a new start elsewhere may find one."""

    exit_code = 69


class StorageError(RuntimeError):
    """The file system refused to write or to read what a run needs."""

    exit_code = 74


class Interrupted(RuntimeError):
    """A signal asked the run to stop; its state is saved and the same command continues it."""

    exit_code = 75


class NonFiniteLoss(RuntimeError):
    """Training diverged: the loss or the gradients are not finite."""

    exit_code = 87


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` ones; suggests the nearest.

    Args:
      what: Kind of the name, such as "config field"; begins the message.
      name: What the user wrote.
      known: The names that would have been accepted.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(known)}.")
