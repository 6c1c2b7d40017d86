"""Runs of the training command, each in a process of its own.

The processes are forked from one that has imported everything and not begun anything, so that a
start costs little; what they do is what `python -m vitcls.main` does.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

import vitcls
from tests import forked
from vitcls import cli, main
from vitcls.checkpoints.manager import Checkpoints

TOTAL_STEPS = 60  # of tiny.py
# What a fast machine and a slow one do not have in common.
_MEASURED = {"time", "train/images_per_second", "train/waiting"}


class Run:
    """One start of the command on a workdir, and what it says."""

    def __init__(self, workdir: Path, data_dir: str, *overrides: str, file_size: int | None = None):
        """Starts it.

        Args:
          workdir: The run's folder.
          data_dir: Where `digits` is prepared.
          overrides: Further flags.
          file_size: Bytes beyond which no file can be written.
        """
        self.workdir = workdir
        self._said = b""
        pipe = workdir.with_name(f"{workdir.name}-{time.monotonic_ns()}.pipe")  # has no file size
        os.mkfifo(pipe)
        self._listener = threading.Thread(target=self._listen, args=[pipe], daemon=True)
        self._listener.start()
        config = Path(__file__).with_name("tiny.py")
        flags = [f"--config={config}", f"--workdir={workdir}", f"--config.data.data_dir={data_dir}"]
        self._process = forked.CONTEXT.Process(
            target=_main, args=([*flags, *overrides], str(pipe), file_size)
        )
        self._process.start()
        self.pid = self._process.pid

    def _listen(self, pipe: Path) -> None:
        with pipe.open("rb", buffering=0) as stream:
            while part := stream.read(2**16):
                self._said += part

    def wait(self, timeout: float = 300) -> int:
        """Returns the exit code, or minus the signal that ended it."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"It hangs:\n{self.output()}"
        self._listener.join(10)
        return self._process.exitcode

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        if self.is_alive():
            os.kill(self.pid, number)

    def output(self) -> str:
        return self._said.decode()

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Whether the condition came true before the run ended; looks a thousand times a second."""
        while self.is_alive():
            if condition():
                return True
            time.sleep(0.001)
        return bool(condition())

    def is_saving(self) -> bool:
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def _main(flags: Sequence[str], pipe: str, file_size: int | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(pipe, os.O_WRONLY), stream.fileno())
    os.environ["XLA_FLAGS"] = ""  # one device
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    vitcls.START_TIME = time.time()
    sys.argv = ["vitcls.main", *flags]
    cli.run(main.main)


def metric_lines(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in _MEASURED} for line in lines]


def results(workdir: Path) -> dict:
    """All but what a clock measured."""
    content = json.loads((workdir / "results.json").read_text())
    measured = ("seconds", "images_per_second", "plan")
    return {name: value for name, value in content.items() if name not in measured}


def arrays(workdir: Path, step: int = TOTAL_STEPS) -> dict:
    """All arrays of a checkpoint."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints._manager.restore(step)
        assert checkpoints.meta(step)
    return {name: jax.device_get(restored[name]) for name in ("params", "opt_state", "ema")}


def assert_same(workdir: Path, undisturbed: Path) -> None:
    """The same bits, every line once, and nothing left over that an undisturbed run has not."""
    jax.tree.map(np.testing.assert_array_equal, arrays(workdir), arrays(undisturbed))
    assert metric_lines(workdir) == metric_lines(undisturbed)
    assert results(workdir) == results(undisturbed)
    left = {
        path.relative_to(workdir).as_posix()
        for path in [*workdir.iterdir(), *(workdir / "checkpoints").iterdir()]
        if not path.name.startswith("events.") and ".corrupt-" not in path.name
    }
    steps = {path.name for path in (undisturbed / "checkpoints").iterdir()}
    kept = {name for name in left if name.startswith("checkpoints/")}
    assert kept == {f"checkpoints/{name}" for name in steps}, (kept, steps)
    assert left - kept == {
        path.name for path in undisturbed.iterdir() if not path.name.startswith("events.")
    }
