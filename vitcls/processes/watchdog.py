"""Ends a process that is stuck: alive, but without progress for too long."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from vitcls.errors import STALLED
from vitcls.processes import distributed

_TICK_SECS = 0.5
# After a longer gap between two ticks, the process must have been stopped and continued.
_MAX_GAP_SECS = 2 * _TICK_SECS


class RunningClock:
    """Counts the seconds in which this process could run.

    A stopped process (SIGSTOP, a suspended job or machine) reads no clock. So a gap between two
    readings counts as `_MAX_GAP_SECS` at most, and something must read at least that often.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Takes the clock to read, in seconds, which also counts while the process is stopped."""
        self._clock, self._last, self._seconds = clock, clock(), 0.0
        self._lock = threading.Lock()

    def read(self) -> float:
        """Returns the seconds so far; any thread may ask."""
        with self._lock:
            now = self._clock()
            self._seconds += min(now - self._last, _MAX_GAP_SECS)
            self._last = now
            return self._seconds


class Watchdog:
    """While entered, a thread waits for signs of progress, each within the time given for it.

    When one is missing, it prints where every thread is, and ends the process. Time in which the
    process was stopped does not count.
    """

    def __init__(self, **budgets: float):
        """Takes `NAME_secs=SECONDS` for everything that `expect` will be told; 0: no limit."""
        self._budgets = budgets
        self._clock = RunningClock()
        # The thread reads this tuple, so it is only replaced as a whole.
        self._expected = ("", 0.0, float("inf"))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def expect(self, what: str) -> None:
        """From now on, the next call must come within the time for `what`."""
        budget = self._budgets[f"{what}_secs"]
        self._expected = (what, budget, self._clock.read() + (budget or float("inf")))

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_TICK_SECS):
            now = self._clock.read()
            what, budget, deadline = self._expected
            if now > deadline:
                _end(f"Stuck: no end of {what} in {budget:g} s (stall.{what}_secs).")


def _end(message: str) -> None:
    faulthandler.dump_traceback(file=sys.__stderr__)
    print(f"ERROR: {message} Above is where each thread is.", file=sys.stderr, flush=True)
    # A stuck main thread would never see a flag or an exception, so the process ends here.
    distributed.leave(STALLED, message)
    os._exit(STALLED)
