"""Where metrics go: `metrics.jsonl` for programs, TensorBoard's event files for people."""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from vitcls.errors import NonFiniteLoss
from vitcls.progress import Progress

# tensorboardX imports torch where it is installed, for seconds and gigabytes; None stops that.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX import SummaryWriter  # noqa: E402

if _torch is None:
    del sys.modules["torch"]


class MetricWriter:
    """Writes scalars to both; after a restart it forgets what came after the restored step."""

    def __init__(
        self, workdir: Path, *, start_step: int, again: Sequence[str] = (), is_main: bool = True
    ):
        """Opens the files of a run.

        Args:
          workdir: The run's folder.
          start_step: The last step that counts; later lines are dropped.
          again: Splits whose evaluation at `start_step` will be done again.
          is_main: Whether this process writes at all.
        """
        self._is_main = is_main
        if not is_main:
            return
        self._path = workdir / "metrics.jsonl"
        _drop_lines(self._path, start_step, again)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(workdir), purge_step=start_step + 1, flush_secs=30)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if not self._is_main:
            return
        line = {"step": step, "time": round(time.time(), 3), **scalars}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()  # a line is there for whoever follows the file, and after a kill
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._is_main:
            self._file.close()
            self._events.close()


class LateMetrics:
    """Reads a step's metrics after the next one has been sent off, and writes their means.

    Attributes:
      window: Metrics of the steps since the last line; part of what a checkpoint keeps, so that
        a run that goes on writes the same means.
    """

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        *,
        every_steps: int,
        window: list[dict[str, float]],
    ):
        self._writer, self._progress = writer, progress
        self._every_steps = every_steps
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self.window = list(window)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the last step; raises `NonFiniteLoss` if it diverged."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(map(math.isfinite, metrics.values())):
            raise NonFiniteLoss(
                f"Step {step} diverged: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}. Nothing of it was saved. Start again in another "
                "--workdir with a lower optim.lr, a longer optim.warmup_steps or a smaller "
                "optim.clip_norm (0 is none)."
            )
        self.window.append(metrics)
        if step % self._every_steps == 0:
            means = {
                f"train/{name}": sum(m[name] for m in self.window) / len(self.window)
                for name in metrics
            }
            means["train/lr"] = metrics["lr"]
            self.window.clear()
            self._writer.write(step, means | self._progress.report(step, means))


def _drop_lines(path: Path, step: int, again: Sequence[str]) -> None:
    """Removes the lines that will be written again, and a last line cut by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        written = json.loads(line)
        is_again = any(name.split("/")[0] in again for name in written)
        if written["step"] < step or (written["step"] == step and not is_again):
            kept.append(line)
    aside = path.with_suffix(".jsonl.tmp")
    aside.write_text("".join(kept))
    aside.replace(path)
