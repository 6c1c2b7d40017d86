"""Weights & Biases, from a process of its own: its failures do not stop training.

Its client waits for the network at its start and at its end, and forever for a stuck helper. A
separate process can be left behind.
"""

import importlib.util
import json
import logging
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from vitcls.errors import UserError
from vitcls.files import written_aside
from vitcls.processes.signals import STOPS

_INIT_SECS, _FINISH_SECS = 60, 15  # how long it waits for the network
_GRACE_SECS = 5  # until it has ended after that

log = logging.getLogger("vitcls")


def check(project: str) -> None:
    """Raises `UserError` if `log.wandb_project` is set and Weights & Biases is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb_project={project!r} needs the package wandb, which is optional: "
            "pip install -r requirements-wandb.txt, or leave the field empty."
        )


class WandbSender:
    """Shows scalars in a run of Weights & Biases, the same one after every restart.

    After `__init__` it raises nothing. Only its end waits, for seconds.
    """

    def __init__(self, workdir: Path, *, project: str, config: dict[str, Any]):
        """Starts the process.

        Args:
          workdir: The run's folder; its file `wandb_id` keeps the id of the W&B run.
          project: The W&B project.
          config: The run's config, for display.
        """
        kept = workdir / "wandb_id"
        key = kept.read_text() if kept.exists() else ""
        if not key:
            key = secrets.token_hex(4)
            with written_aside(kept) as aside:
                aside.write_text(key)
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # In a session of its own it does not receive Ctrl-C: the run does, and then ends it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vitcls.logs.wandb_sender"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        )  # fmt: skip
        self._is_failed = self._is_behind = False
        self._tell(
            project=project, id=key, name=workdir.absolute().name, dir=str(workdir.absolute()),
            config=config,
        )  # fmt: skip
        os.set_blocking(self._process.stdin.fileno(), False)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._tell(step=step, **scalars)

    def __enter__(self) -> "WandbSender":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        self._tell(exit_code=int(error_type is not None))
        self._process.stdin.close()
        try:
            self._process.wait(_FINISH_SECS + _GRACE_SECS)
        except subprocess.TimeoutExpired:
            self._fail("it does not end")

    def _tell(self, **message: Any) -> None:
        if self._is_failed:
            return
        try:
            os.write(self._process.stdin.fileno(), (json.dumps(message) + "\n").encode())
        except BlockingIOError:  # the pipe is full: nothing was read for hundreds of lines
            if not self._is_behind:
                log.warning("Weights & Biases falls behind: lines are left out there.")
            self._is_behind = True
        except OSError as error:  # it has ended
            self._fail(str(error))

    def _fail(self, why: str) -> None:
        log.warning("Weights & Biases gets no more of this run (%s); metrics.jsonl has all.", why)
        self._is_failed = True
        self._process.kill()
        self._process.wait()


def _send() -> None:
    """The process: reads the run's description, then lines of scalars, and last the exit code."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    # It reads continuously, as the run does not wait for this process.
    def read() -> None:
        for line in sys.stdin:
            if line.endswith("\n"):  # a kill may cut the last one
                lines.put(line)
        lines.put('{"exit_code": 1}')  # counts only if the run was killed and sent no exit code

    for number in STOPS:
        # Clusters signal all processes; the run itself ends this one.
        signal.signal(number, signal.SIG_IGN)
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=read, daemon=True).start()
    run = _open(**asked)
    # Its own steps cannot go back, as ours do when a run continues from its last checkpoint.
    run.define_metric("*", step_metric="step")
    while "exit_code" not in (scalars := json.loads(lines.get())):
        run.log(scalars)
    run.finish(exit_code=scalars["exit_code"])


def _open(**asked: Any) -> Any:
    """The `wandb.Run`, online if that is possible."""
    import wandb

    asked |= {
        "resume": "allow",
        "settings": wandb.Settings(
            console="off", silent=True, init_timeout=_INIT_SECS, finish_timeout=_FINISH_SECS
        ),
    }
    try:
        run = wandb.init(**asked)
    except Exception as error:  # no login, no network
        wandb.teardown()
        run = wandb.init(mode="offline", **asked)
        print(
            f"Weights & Biases: {error}\nIt keeps this run's metrics in {asked['dir']}/wandb; "
            "later `wandb sync` can send them.",
            file=sys.stderr,
        )
    else:
        if not run.offline:
            print(f"Weights & Biases: {run.url}", file=sys.stderr)
    return run


if __name__ == "__main__":
    _send()
