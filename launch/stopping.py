"""Ctrl-C and SIGTERM for a process that waits for others: noted at once, obeyed by its loop."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM and SIGINT set `name`; a second one acts as if nothing caught it.

    `vitcls.signals` is for a run: all its processes agree on a stop, which has to reach a process
    that compiles. Here nothing is to be saved but what others save.
    """

    def __init__(self):
        self.name: str | None = None
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.__exit__()
