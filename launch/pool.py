"""Trials as processes of this machine: some at a time, watched, stopped together."""

import logging
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from launch.trials import Trial
from vitcls.progress import duration, on_terminal
from vitcls.records import write_json
from vitcls.signals import StopRequest

_POLL_SECS = 0.5

log = logging.getLogger("vitcls")


class Pool:
    """Runs trials, `jobs` at a time, each in a process and a session of its own.

    Attributes:
      ends: By name of the trial, `{"state": ..., "exit_code": ...}` of those that did not finish.
    """

    def __init__(self, trials: list[Trial], *, jobs: int, on_end: Callable[[], None]):
        """Takes the trials; `on_end` is called whenever one has ended."""
        self.ends: dict[str, dict[str, Any]] = {}
        self._waiting = deque(trials)
        self._running: dict[str, tuple[Trial, subprocess.Popen]] = {}
        self._jobs, self._on_end = jobs, on_end
        self._num_trials, self._seconds = len(trials), []

    def run(self, stop: StopRequest) -> None:
        """Runs all trials; returns early, with the running ones saved, when `stop` is asked."""
        screen = Screen(1 + self._jobs)
        told = False
        try:
            while self._running or (self._waiting and not stop.name):
                while self._waiting and len(self._running) < self._jobs and not stop.name:
                    self._start(self._waiting.popleft())
                if stop.name and not told:
                    told = True
                    log.info("%s: %d trials save and stop.", stop.name, len(self._running))
                    for _, process in self._running.values():
                        process.terminate()
                time.sleep(_POLL_SECS)
                for trial, process in list(self._running.values()):
                    if process.poll() is not None:
                        self._ended(trial, process.returncode, stopping=told)
                screen.show(self._lines())
        finally:
            screen.close()
            for _, process in self._running.values():  # an error, or a second Ctrl-C
                process.kill()
                process.wait()

    def _start(self, trial: Trial) -> None:
        trial.workdir.mkdir(parents=True, exist_ok=True)
        write_json(trial.workdir / "asked.json", trial.config.to_dict())
        with (trial.workdir / "log.txt").open("a") as file:
            print("$", shlex.join(trial.command), file=file, flush=True)
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.tied", str(os.getpid()), *trial.command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,  # Ctrl-C reaches this process alone, which tells them once
            )  # fmt: skip
        self._running[trial.name] = trial, process
        log.info("%s: started, log in %s", trial.name, trial.workdir / "log.txt")

    def _ended(self, trial: Trial, code: int, *, stopping: bool) -> None:
        del self._running[trial.name]
        results = trial.results()
        if code == 0 and results:
            self.ends.pop(trial.name, None)
            self._seconds.append(results["seconds"])
            log.info("%s: finished, %s", trial.name, trial.last_words())
        elif stopping or code == 75:
            self.ends[trial.name] = {"state": "stopped", "exit_code": code}
            log.info("%s: stopped with code %d: %s", trial.name, code, trial.last_words())
            if not stopping:  # someone stopped this one trial, which has saved
                self._waiting.appendleft(trial)
        else:
            self.ends[trial.name] = {"state": "failed", "exit_code": code}
            log.warning("%s: failed with code %d: %s", trial.name, code, trial.last_words())
        self._on_end()

    def _lines(self) -> list[str]:
        states = [end["state"] for end in self.ends.values()]
        left = len(self._waiting) + len(self._running)
        head = (
            f"{len(self._seconds)} of {self._num_trials} finished, {states.count('failed')} failed,"
            f" {len(self._running)} running, {len(self._waiting)} waiting"
        )
        if self._seconds and left:
            mean = sum(self._seconds) / len(self._seconds)
            head += f"; at most {duration(mean * -(-left // self._jobs))} left"
        return [head, *(_line(trial) for trial, _ in self._running.values())]


def _line(trial: Trial) -> str:
    metrics = trial.metrics()
    if not metrics:
        return f"  {trial.name}: starting"
    speed = metrics.get("train/images_per_second")
    return (
        f"  {trial.name}: step {metrics['step']}/{trial.total_steps()}, "
        f"loss {metrics['train/loss']:.4f}" + (f", {speed:.1f} images/s" if speed else "")
    )


class Screen:
    """Lines at the bottom of a terminal that are written over; nothing where there is none."""

    def __init__(self, num_lines: int):
        self._bars, self._redirect = [], None
        if on_terminal():
            self._bars = [
                tqdm(bar_format="{desc}", position=row, leave=False, dynamic_ncols=True)
                for row in range(num_lines)
            ]
            self._redirect = logging_redirect_tqdm(loggers=[log])
            self._redirect.__enter__()

    def show(self, lines: list[str]) -> None:
        for row, bar in enumerate(self._bars):
            bar.set_description_str(lines[row] if row < len(lines) else "")

    def close(self) -> None:
        for bar in self._bars:
            bar.close()
        if self._redirect is not None:
            self._redirect.__exit__(None, None, None)
