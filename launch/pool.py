"""Runs trials as processes of this machine: several at a time, watched, stopped together."""

import logging
import os
import shlex
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from launch import local, watch
from launch.stopping import StopRequest
from launch.trials import Trial
from vitcls.errors import Unavailable, UserError
from vitcls.logs.progress import duration

_POLL_SECS = 0.5
# Starts of a trial that finds no devices, on other GPUs if there are any.
_MAX_STARTS = 4

log = logging.getLogger("vitcls")


def share_gpus(jobs: int) -> list[str | None]:
    """Returns the `CUDA_VISIBLE_DEVICES` of each job: its share of this machine's GPUs.

    None (with one job, or without NVIDIA GPUs) leaves the variable as it is.

    Raises:
      UserError: The GPUs cannot be shared evenly.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        names = [row for row in listed.stdout.splitlines() if row.startswith("GPU ")]
        visible = ",".join(str(index) for index in range(len(names)))
    gpus = visible.split(",") if visible else []
    if jobs == 1 or not gpus:
        return [None] * jobs
    if len(gpus) % jobs:
        raise UserError(f"--jobs={jobs} cannot share {len(gpus)} GPUs evenly; use a divisor.")
    share = len(gpus) // jobs
    return [",".join(gpus[slot * share :][:share]) for slot in range(jobs)]


class Pool:
    """Runs trials, several at a time, each in its own process and session.

    Attributes:
      states: `{"state": ..., "exit_code": ...}` by trial name, for the started trials.
    """

    def __init__(self, trials: list[Trial], *, jobs: int, on_change: Callable[[], None]):
        """Takes the trials and how many run at once; `on_change` is called at starts and ends."""
        self.states: dict[str, dict[str, Any]] = {}
        self._waiting = deque(trials)
        self._running: dict[str, tuple[Trial, subprocess.Popen, str | None]] = {}
        self._free = share_gpus(jobs)
        self._jobs, self._on_change = jobs, on_change
        self._num_trials, self._seconds = len(trials), []
        self._slots = set(self._free)
        # The GPUs of each start that found no devices, by trial.
        self._without_device: dict[str, list[str | None]] = {}

    def run(self, stop: StopRequest) -> None:
        """Runs all trials; on `stop` it returns early, after the running ones have saved."""
        screen = watch.Screen(1 + self._jobs)
        told = False
        try:
            while self._running or (self._waiting and not stop.name):
                while not stop.name and (found := self._next()):
                    self._start(*found)
                if stop.name and not told:
                    told = True
                    log.info("%s: %d running trials save and stop.", stop.name, len(self._running))
                    for _, process, _ in self._running.values():
                        process.terminate()
                time.sleep(_POLL_SECS)
                for trial, process, _ in list(self._running.values()):
                    if process.poll() is not None:
                        self._ended(trial, process.returncode, stopping=told)
                screen.show(self._lines())
        finally:
            screen.close()
            # Only an error or a second Ctrl-C leaves trials running here.
            for _, process, _ in self._running.values():
                (process.kill if told else process.terminate)()
                process.wait()

    def _next(self) -> tuple[Trial, str | None] | None:
        """The next trial to start, with GPUs other than those where it found no devices."""
        for trial in self._waiting:
            tried = set(self._without_device.get(trial.name, ()))
            for gpus in self._free:
                if gpus not in tried or tried == self._slots:
                    return trial, gpus
        return None

    def _start(self, trial: Trial, gpus: str | None) -> None:
        trial.prepare()
        self._waiting.remove(trial)
        self._free.remove(gpus)
        with (trial.workdir / "log.txt").open("a") as file:
            print("$", shlex.join(trial.command), file=file, flush=True)
            process = local.start(trial.command, output=file, gpus=gpus)
        self._running[trial.name] = trial, process, gpus
        self.states[trial.name] = {"state": "running", "exit_code": None}
        log.info("%s: started, log in %s", trial.name, trial.workdir / "log.txt")
        self._on_change()

    def _ended(self, trial: Trial, code: int, *, stopping: bool) -> None:
        gpus = self._running.pop(trial.name)[2]
        self._free.append(gpus)
        if code == 0 and (results := trial.results()):
            state = "finished"
            self._seconds.append(results["seconds"])
        elif stopping or code == 75:
            state = "stopped"
            if not stopping:  # only this trial was stopped, after saving
                self._waiting.appendleft(trial)
        else:
            state = "failed"
            if code == Unavailable.exit_code:
                starts = self._without_device.setdefault(trial.name, [])
                starts.append(gpus)
                if len(starts) < _MAX_STARTS:
                    state = "waiting"
                    self._waiting.append(trial)
        self.states[trial.name] = {"state": state, "exit_code": code}
        watch.log_end(trial, state, code)
        self._on_change()

    def _lines(self) -> list[str]:
        failed = [state for state in self.states.values() if state["state"] == "failed"]
        left = len(self._waiting) + len(self._running)
        head = (
            f"{len(self._seconds)} of {self._num_trials} finished, {len(failed)} failed, "
            f"{len(self._running)} running, {len(self._waiting)} waiting"
        )
        if self._seconds and left:
            mean = sum(self._seconds) / len(self._seconds)
            head += f"; at most {duration(mean * -(-left // self._jobs))} left"
        return [head, *(watch.progress_line(trial) for trial, _, _ in self._running.values())]
