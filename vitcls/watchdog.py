"""Ends a process that is stuck: alive, but without progress for longer than that may take."""

import faulthandler
import logging
import os
import sys
import threading
import time

from vitcls import distributed
from vitcls.errors import STALLED

log = logging.getLogger("vitcls")

_TICK_SECS = 0.5
# A process that took longer from one tick to the next could not run meanwhile: it was stopped by
# SIGSTOP, a suspended job or a laptop's lid, or had no processor.
_LONGEST_TICK_SECS = 1.0
_TOLD_SECS = 10


class Watchdog:
    """While entered, a thread waits for signs of progress, each within the time given for it.

    The time is that in which the process could run.

    When one is missing, it prints where every thread is, and ends the process: nothing else could,
    as a stuck main thread does not come back to see a flag or an exception.
    """

    def __init__(self, **budgets: float):
        """Takes `NAME_secs=SECONDS` for everything that `expect` will be told; 0: no limit."""
        self._budgets = budgets
        self._expected = ("", 0.0, float("inf"))  # replaced as a whole: read by the thread
        self._stopped = 0.0  # seconds in which the process could not run
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def expect(self, what: str) -> None:
        """From now on, the next call must come within the time for `what`."""
        budget = self._budgets[f"{what}_secs"]
        self._expected = (what, budget, self._running() + (budget or float("inf")))

    def _running(self) -> float:
        return time.monotonic() - self._stopped

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._is_over.wait(_TICK_SECS):
            before, last = last, time.monotonic()
            stopped = last - before - _TICK_SECS if last - before > _LONGEST_TICK_SECS else 0.0
            self._stopped += stopped
            if stopped > _TOLD_SECS:
                log.warning("The process was stopped for %.0f s; no limit counts them.", stopped)
            what, budget, deadline = self._expected
            if self._running() > deadline:
                _end(f"Stuck: no end of {what} in {budget:g} s (stall.{what}_secs).")


def _end(message: str) -> None:
    faulthandler.dump_traceback(file=sys.__stderr__)
    print(f"ERROR: {message} Above is where each thread is.", file=sys.stderr, flush=True)
    distributed.leave(STALLED, message)
    os._exit(STALLED)
