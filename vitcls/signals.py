"""Signals that ask a run to stop: noted at once, obeyed by the loop between two steps."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM and SIGINT set `name`; a second one acts as if nothing caught it.

    A handler must not do more: raising from it would lose a checkpoint that is being written.
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
