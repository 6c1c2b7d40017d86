"""A file that one process at a time holds."""

import fcntl
import pathlib
from typing import TextIO


class Lock:
    """Held by one process at a time, released by the system however the process ends."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that prepares {self._path.parent}.", flush=True)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self._file

    def __exit__(self, *_) -> None:
        self._file.close()  # the file stays: deleting it would let two processes in
