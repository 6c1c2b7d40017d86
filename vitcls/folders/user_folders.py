"""Folders of the user. Some containers have no home folder: no HOME and no passwd entry."""

import os
from pathlib import Path

from vitcls.errors import UserError


def home() -> Path | None:
    """The user's home directory, or None."""
    folder = os.path.expanduser("~")  # stays "~" without a home
    return Path(folder) if os.path.isabs(folder) else None


def cache() -> Path | None:
    """The folder of files that may be deleted at any time; None: there is none.

    It is `$XDG_CACHE_HOME/vitcls`, by default `~/.cache/vitcls`.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if folder.is_absolute():
        return folder / "vitcls"
    return home() and home() / ".cache" / "vitcls"


def check_home(what: str, *instead: str, settings: str = "") -> None:
    """Raises `UserError` if something needs a folder and there is none.

    Args:
      what: What is kept in the home directory; begins the message.
      *instead: Environment variables that name another folder.
      settings: Flags and fields that name another folder, as the message shows them.
    """
    if home() is None and not any(map(os.environ.get, instead)):
        advice = " or ".join([*filter(None, [settings]), *instead])
        raise UserError(
            f"{what} are kept in the home directory, which this user does not have: set {advice} "
            "to a folder."
        )
