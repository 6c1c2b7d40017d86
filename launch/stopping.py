"""Ctrl-C, SIGTERM and SIGHUP for a process that waits for others: noted at once, obeyed later."""

import signal
from types import FrameType

from vitcls.processes import signals

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """While entered, one of these signals sets `name`; a second one acts as if nothing caught it.

    But SIGHUP, which comes twice when a terminal is closed: from the system and from the shell.

    `vitcls.processes.signals` is for a run: all its processes agree on a stop, which has to reach a
    process that compiles. Here nothing is to be saved but what others save.
    """

    def __init__(self):
        self.name: str | None = None
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._note) for number in signals.heeded(_SIGNALS)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        signals.leave_terminal()
        self.name = signal.Signals(number).name
        for other, handler in self._previous.items():
            if other != signal.SIGHUP:
                signal.signal(other, handler)
