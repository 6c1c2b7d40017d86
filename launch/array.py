"""Runs trials as one SLURM array job and watches it; the job continues without the watcher."""

import logging
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import slurm, watch
from launch.resources import Resources
from launch.stopping import StopRequest
from launch.trials import Trial
from vitcls.errors import UserError
from vitcls.files import read_json, write_json

_POLL_SECS = 5
# Wait after a task left the queue: on NFS its last files may appear later.
_SETTLE_SECS = 30
_MAX_LINES = 10  # running trials on the screen

log = logging.getLogger("vitcls")


class Array:
    """The unfinished trials of a sweep, as tasks of array jobs.

    `slurm.json` in the sweep's folder lists the jobs and their trials, so that a trial in the queue
    is not submitted again.

    Attributes:
      states: `{"state": ..., "exit_code": None}` by trial name.
    """

    def __init__(self, trials: list[Trial], workdir: Path, *, on_change: Callable[[], None]):
        """Takes the trials; `on_change` is called after each end of a trial."""
        self.states: dict[str, dict[str, Any]] = {}
        self._trials = {trial.name: trial for trial in trials}
        self._path, self._on_change = workdir / "slurm.json", on_change
        remedy = "end the sweep's jobs with scancel, remove the file, and run the command again"
        self._jobs = read_json(self._path, remedy=remedy) if self._path.exists() else {}

    def submit(self, resources: Resources, *, jobs: int | None) -> None:
        """Submits trials that are not in the queue as one array; at most `jobs` tasks run at once.

        Raises:
          UserError: sbatch refuses the job.
        """
        active = self._active()
        new = [trial for name, trial in self._trials.items() if name not in active]
        if active:
            log.info("%d trials are already in the queue.", len(active))
        if not new:
            return
        stem = self._path.with_name(f"array-{len(self._jobs)}")
        for trial in new:
            trial.prepare()
        lines = [f"{trial.workdir}\t{shlex.join(trial.command)}\n" for trial in new]
        commands = stem.with_suffix(".txt")
        commands.write_text("".join(lines))
        text = slurm.array_script(
            commands, len(new), self._path.parent, resources, jobs=jobs or len(new)
        )
        job = slurm.submit(text, stem.with_suffix(".sh"))
        self._jobs[job] = [trial.name for trial in new]
        write_json(self._path, self._jobs)
        log.info("Job %s with %d trials; `scancel %s` ends it.", job, len(new), job)

    def run(self, stop: StopRequest) -> None:
        """Watches until no trial is in the queue; returns early on `stop`."""
        left, gone_since = dict(self._trials), {}
        screen = watch.Screen(1 + _MAX_LINES)
        try:
            while left and not stop.name:
                try:
                    # Before the results are read: a task that is gone has written its results.
                    active = self._active()
                except UserError as error:  # SLURM's controller may be busy for a moment
                    log.warning("%s", error)
                    _sleep(stop)
                    continue
                for name, trial in list(left.items()):
                    state = active.get(name, "finished" if trial.results() else "failed").lower()
                    if state == "failed":
                        since = gone_since.setdefault(name, time.monotonic())
                        if time.monotonic() - since < _SETTLE_SECS:
                            continue
                    self.states[name] = {"state": state, "exit_code": None}
                    if name not in active:
                        del left[name]
                        watch.log_end(trial, state)
                        self._on_change()
                running = [trial for name, trial in left.items() if active.get(name) == "RUNNING"]
                head = f"{len(left)} of {len(self._trials)} in the queue, {len(running)} running"
                screen.show([head, *(watch.progress_line(trial) for trial in running[:_MAX_LINES])])
                if left:
                    _sleep(stop)
        finally:
            screen.close()

    def _active(self) -> dict[str, str]:
        """Returns SLURM's state, such as RUNNING, of the trials in its queue."""
        tasks = slurm.active_tasks()
        return {
            name: tasks[job, index]
            for job, names in self._jobs.items()
            for index, name in enumerate(names)
            if (job, index) in tasks and name in self._trials
        }


def _sleep(stop: StopRequest) -> None:
    end = time.monotonic() + _POLL_SECS
    while time.monotonic() < end and not stop.name:
        time.sleep(0.2)
