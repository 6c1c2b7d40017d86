"""How far a run is: a bar on a terminal, plain lines otherwise, and the speed behind both."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

T = TypeVar("T")
log = logging.getLogger("vitcls")


def on_terminal() -> bool:
    """Whether somebody watches: bars are drawn only then."""
    return sys.stderr.isatty()


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Iterates with a bar that disappears at the end; silent where there is no terminal."""
    return tqdm(items, description, total, leave=False, disable=not on_terminal())


class Progress:
    """Counts steps, the seconds they took and the seconds spent waiting for data."""

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

    def __enter__(self) -> "Progress":
        if not self._bar.disable:
            self._redirect.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()
        if not self._bar.disable:
            self._redirect.__exit__(*error)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        start = time.monotonic()
        yield
        self._window_waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (compilation, evaluation, saving) does not count as training."""
        start = time.monotonic()
        yield
        self._last += time.monotonic() - start

    def step_done(self) -> None:
        now = time.monotonic()
        self._bar.update()
        if not self._started:  # the first step compiles: it says nothing about speed
            self._started, self._last, self._window_waited = True, now, 0.0
            return
        self._steps += 1
        self._window_steps += 1
        self._seconds += now - self._last
        self._window_seconds += now - self._last
        self._last = now

    def images_per_second(self) -> float | None:
        """Mean over the whole process; None before two steps are done."""
        return self._steps * self._batch_size / self._seconds if self._seconds else None

    def report(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Shows `metrics` (train/loss, train/lr) and returns the speed since the last report.

        Nothing is returned where the only step since then is the first, which compiles.
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
