"""Handles Ctrl-C, SIGTERM and SIGHUP in a process that waits for others."""

import signal
from types import FrameType

from vitcls.processes import signals

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """While entered, a signal sets `name`; a second one has its usual effect.

    A second SIGHUP has no effect: a closed terminal sends it twice, from the system and the shell.

    `vitcls.processes.signals` serves a run, whose processes must agree on a stop and save. A
    process that only waits has nothing to save.
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
