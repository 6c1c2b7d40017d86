"""Runs one run on this machine, and starts it again if its exit code asks for that."""

import logging
import os
import subprocess
import sys
import time
from typing import IO

from launch.stopping import StopRequest
from vitcls.errors import Unavailable

_POLL_SECS = 0.2
_PAUSE_SECS = 1
# Pause after a start without devices: another process may be about to release them.
_NO_DEVICE_PAUSE_SECS = 10
# Finished, a mistake, diverged: another start would end in the same way.
ENDS = (0, 2, 87)

log = logging.getLogger("vitcls")


def start(
    command: list[str], *, output: IO | None = None, gpus: str | None = None
) -> subprocess.Popen:
    """Starts a command that saves and ends if this process ends; Ctrl-C does not reach it.

    Args:
      command: The program and its arguments.
      output: File for its output; None: the output of this process.
      gpus: Its `CUDA_VISIBLE_DEVICES`; None: that of this process.
    """
    env = None if gpus is None else os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.tied", str(os.getpid()), *command],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=env,
    )  # fmt: skip


def run(command: list[str], *, max_restarts: int) -> int:
    """Runs the command until it finishes, fails for good or is stopped; returns its exit code."""
    failures = 0
    with StopRequest() as stop:
        while True:
            code = _run_once(command, stop)
            failures += code != 75
            if stop.name or code in ENDS or failures > max_restarts:
                return code if code >= 0 else 128 - code
            log.info("Ended with %d: starting again.", code)
            pause = _NO_DEVICE_PAUSE_SECS if code == Unavailable.exit_code else _PAUSE_SECS
            _sleep(pause, stop)


def _sleep(seconds: float, stop: StopRequest) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.name:
        time.sleep(_POLL_SECS)


def _run_once(command: list[str], stop: StopRequest) -> int:
    process = start(command)
    told = False
    try:
        while process.poll() is None:
            if stop.name and not told:
                told = True
                process.terminate()
            time.sleep(_POLL_SECS)
    finally:
        # After an error or a second Ctrl-C; without effect on a process that has ended.
        process.kill()
    return process.wait()
