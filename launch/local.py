"""One run on this machine, started again as its exit code says."""

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
# After a start without devices: another process may be about to give them back.
_NO_DEVICE_PAUSE_SECS = 10
ENDS = (0, 2, 87)  # finished, a mistake, diverged: another start would end the same

log = logging.getLogger("vitcls")


def start(
    command: list[str], *, output: IO | None = None, gpus: str | None = None
) -> subprocess.Popen:
    """Starts a command that ends, saved, with this process; Ctrl-C does not reach it by itself.

    Args:
      command: The program and its arguments.
      output: Where its output goes, default to ours.
      gpus: Its `CUDA_VISIBLE_DEVICES`, default ours.
    """
    env = None if gpus is None else os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.tied", str(os.getpid()), *command],
        stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=env,
    )  # fmt: skip


def run(command: list[str], *, max_restarts: int) -> int:
    """Runs the command until it is finished or hopeless, or a signal stops it; returns its code."""
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
        process.kill()  # an error, or a second Ctrl-C; does nothing to what has ended
    return process.wait()
