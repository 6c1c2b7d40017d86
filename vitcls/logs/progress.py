"""Progress of a run: a bar on a terminal, plain lines otherwise, and the speed.

A silent log looks like a job that is stuck. Without a terminal, a thread therefore logs the current
work whenever the log has had no line for `LINE_SECS`.
"""

import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

T = TypeVar("T")
log = logging.getLogger("vitcls")

LINE_SECS = 25.0  # half a minute, less the delays of a busy process
_DOING: list[Callable[[], str]] = []  # describe the work in progress, the innermost last
_last_line = time.monotonic()  # time of the log's last line, of any kind


def _note_line(record: logging.LogRecord) -> bool:
    global _last_line
    _last_line = time.monotonic()
    return True


log.addFilter(_note_line)


def on_terminal() -> bool:
    """Whether stderr is a terminal. Bars are shown only there."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def doing(what: str | Callable[[], str]) -> Iterator[None]:
    """Encloses work that may take long: `what` is logged as long as nothing else is.

    Args:
      what: Text, which is logged with the time since the start; or a function that returns a whole
        line and is called in another thread.
    """
    global _last_line
    start = time.monotonic()

    def describe() -> str:
        return what() if callable(what) else f"{what}: {duration(time.monotonic() - start)} so far."

    if on_terminal():
        yield
        return
    if silence() >= LINE_SECS:  # the silence of earlier work does not count
        _last_line = start
    _DOING.append(describe)
    _start_talking()
    try:
        yield
    finally:
        _DOING.remove(describe)


def silence() -> float:
    """Seconds since the log's last line."""
    return time.monotonic() - _last_line


@functools.cache
def _start_talking() -> None:
    threading.Thread(target=_talk, name="progress", daemon=True).start()


def _talk() -> None:
    while True:
        time.sleep(LINE_SECS / 30)
        say_if_silent()


def say_if_silent() -> None:
    """Logs the current work, if any, after `LINE_SECS` without a line."""
    if silence() >= LINE_SECS and (innermost := _DOING[-1:]):
        log.info("%s", innermost[0]())


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Iterates with a bar that disappears at the end; without a terminal see `doing`."""
    if on_terminal():
        yield from tqdm(items, description, total, leave=False)
        return
    total = total if total is not None or not hasattr(items, "__len__") else len(items)
    start, num_done = time.monotonic(), 0

    def describe() -> str:
        seconds = time.monotonic() - start
        if not total or not num_done:
            return f"{description}: {num_done} of {total or '?'} in {duration(seconds)}."
        left = seconds / num_done * (total - num_done)
        return f"{description}: {num_done} of {total}, {duration(left)} left."

    with doing(describe):
        for item in items:
            yield item
            num_done += 1


class Progress:
    """Counts steps, their seconds and the seconds spent waiting for data."""

    def __init__(self, start_step: int, total_steps: int, *, global_batch_size: int):
        self._batch_size = global_batch_size
        self._total_steps = total_steps
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not on_terminal()
        )
        self._steps = self._window_steps = 0
        self._seconds = self._window_seconds = self._window_waited = 0.0
        self._started, self._last = False, time.monotonic()
        self._redirect = logging_redirect_tqdm(loggers=[log])
        self._step = start_step
        self._doing = doing(lambda: f"step {self._step}/{total_steps}.")

    def __enter__(self) -> "Progress":
        self._doing.__enter__()
        if not self._bar.disable:
            self._redirect.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._doing.__exit__(*error)
        self._bar.close()
        if not self._bar.disable:
            self._redirect.__exit__(*error)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.monotonic()
        yield
        self._window_waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (compilation, evaluation, saving) does not count as training."""
        start = time.monotonic()
        yield
        self._last += time.monotonic() - start

    def step_done(self) -> None:
        now = time.monotonic()
        self._bar.update()
        self._step += 1
        if not self._started:  # the first step compiles: it says nothing about speed
            self._started, self._last, self._window_waited = True, now, 0.0
            return
        self._steps += 1
        self._window_steps += 1
        self._seconds += now - self._last
        self._window_seconds += now - self._last
        self._last = now

    def images_per_second(self) -> float | None:
        """Mean since this process started; None before two steps are done."""
        return self._steps * self._batch_size / self._seconds if self._seconds else None

    def report(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Shows `metrics` (train/loss, train/lr) and returns the speed since the last report.

        The first step, which compiles, does not count; the result is empty if it is the only one.
        """
        shown, left, measured = f"loss {metrics['train/loss']:.4f}", "", {}
        if self._window_steps:
            seconds = max(self._window_seconds, 1e-9)
            speed = self._window_steps * self._batch_size / seconds
            waited = min(self._window_waited / seconds, 1.0)
            measured = {"train/images_per_second": speed, "train/waiting": waited}
            shown += f", {speed:.1f} images/s, waiting {waited:.0%}"
            seconds_left = (self._total_steps - step) * self._batch_size / speed
            left = f", {duration(seconds_left)} left"
        self._window_steps, self._window_seconds, self._window_waited = 0, 0.0, 0.0
        if not self._bar.disable:
            self._bar.set_postfix_str(shown)
        else:
            log.info("step %d/%d: %s%s", step, self._total_steps, shown, left)
        return measured


def duration(seconds: float) -> str:
    """Returns `1:02:03`, or `2:03` below an hour."""
    return tqdm.format_interval(seconds)
