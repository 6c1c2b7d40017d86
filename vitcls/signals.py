"""Signals that ask a run to stop: obeyed at once where nothing is lost, else between two steps."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from vitcls.errors import Interrupted

# USR1 and USR2 are what clusters send, on demand, some time before they end a job.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def exit_on_signal() -> None:
    """From here on a signal ends the command, with the code that says: run it again.

    For what comes before and after training, where all that is worth keeping is saved.
    """

    def end(number: int, frame: FrameType | None) -> None:
        ignore()  # a second one must not come between this one and its end
        _say(f"{_name(number)}: stopped outside of training; run the same command again.")
        sys.exit(Interrupted.exit_code)

    for number in _SIGNALS:
        signal.signal(number, end)


def ignore() -> None:
    """From here on signals do nothing, for a process that ends; a second Ctrl-C still kills it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopRequest:
    """While entered, signals are only noted, for `poll`; but after a SIGINT, a second one kills.

    A handler must not do more: raising from it would lose a checkpoint that is being written.
    Other signals may come repeatedly: clusters send a SIGTERM after the signal asked for.

    Attributes:
      name: The signal that `poll` knows of; None: none.
    """

    def __init__(self, vote: Callable[[int], int] = int):
        """Takes what makes one number of those of all processes: `distributed.late_maximum`."""
        self.name: str | None = None
        self._number = 0
        self._vote = vote
        self._previous = {}

    def poll(self) -> str | None:
        """Returns `name`. To be called by all processes equally often, which then agree on it."""
        number = self._vote(self._number)
        if self.name is None and number:
            self.name = _name(number)
        return self.name

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._number:
            self._number = number
            _say(f"{_name(number)}: saving, then stopping; a second Ctrl-C stops at once.")
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # ends even a process that is not in Python


def _name(number: int) -> str:
    return signal.Signals(number).name


def _say(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # a handler may interrupt a print, which cannot be entered
