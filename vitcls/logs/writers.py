"""Sinks of metrics: `metrics.jsonl` for programs, TensorBoard and Weights & Biases for people."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from vitcls.errors import NonFiniteLoss
from vitcls.files import written_aside
from vitcls.logs.progress import Progress
from vitcls.logs.wandb_sender import WandbSender

# tensorboardX would import torch if it is installed, which costs seconds and gigabytes. None in
# its place prevents that.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX import proto, summary  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402

if _torch is None:
    del sys.modules["torch"]

log = logging.getLogger("vitcls")


class JsonLines:
    """`metrics.jsonl`; a restart removes the lines after the restored step."""

    def __init__(self, workdir: Path, *, start_step: int, again: Sequence[str]):
        _drop_lines(workdir / "metrics.jsonl", start_step, again)
        self._file = (workdir / "metrics.jsonl").open("a")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        line = {"step": step, "time": round(time.time(), 3), **scalars}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


class EventFiles:
    """TensorBoard's event files, which record restarts."""

    def __init__(self, workdir: Path, *, start_step: int):
        # tensorboardX' SummaryWriter does not do: a full disk ends its thread, and then writing
        # never returns.
        self._events = EventsWriter(str(workdir / "events"))
        restart = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
        self._add(start_step + 1, session_log=restart)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._add(step, summary=summary.scalar(name, value))
        self._events.flush()

    def _add(self, step: int, **what: Any) -> None:
        self._events.write_event(proto.event_pb2.Event(wall_time=time.time(), step=step, **what))

    def __enter__(self) -> "EventFiles":
        return self

    def __exit__(self, *_) -> None:
        self._events.close()


class MetricWriter:
    """Writes scalars to all sinks; lines after a restart replace earlier ones."""

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        again: Sequence[str] = (),
        is_main: bool = True,
        wandb_project: str = "",
        config: dict[str, Any] | None = None,
    ):
        """Opens the files of a run.

        Args:
          workdir: The run's folder.
          start_step: The last step that counts; later lines are dropped.
          again: Splits that will be evaluated again at `start_step`.
          is_main: Whether this process writes at all.
          wandb_project: Project of Weights & Biases; "": none.
          config: The run's config, for display there.
        """
        self._skipped_path = workdir / "nonfinite.jsonl"
        self._closing = contextlib.ExitStack()
        self._sinks = []
        if not is_main:
            return
        _drop_lines(self._skipped_path, start_step)
        self._add(JsonLines(workdir, start_step=start_step, again=again))
        self._add(EventFiles(workdir, start_step=start_step))
        if wandb_project:
            self._add(WandbSender(workdir, project=wandb_project, config=config))

    def _add(self, sink: JsonLines | EventFiles | WandbSender) -> None:
        self._sinks.append(self._closing.enter_context(sink))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        # Each line is flushed, for readers that follow the file and against kills. On a full disk a
        # line is kept and written with the next one, or at the end.
        for sink in self._sinks:
            try:
                sink.write(step, scalars)
            except OSError as error:
                log.error("Metrics of step %d are kept in memory: %s.", step, error)

    def write_skipped(self, step: int, metrics: dict[str, Any], ids: list[str]) -> None:
        """Adds a skipped step and the ids of its images to `nonfinite.jsonl`."""
        if not self._sinks:
            return
        line = {"step": step, "loss": str(metrics["loss"]), "grad_norm": str(metrics["grad_norm"])}
        with self._skipped_path.open("a") as file:
            file.write(json.dumps(line | {"ids": ids}) + "\n")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error) -> None:
        self._closing.__exit__(*error)


class LateMetrics:
    """Reads a step's metrics once the next step has been dispatched, and writes their means.

    Attributes:
      window: Metrics since the last line, of the steps that changed something. Checkpoints keep
        them, so a continued run writes the same means.
    """

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        *,
        every_steps: int,
        window: list[dict[str, float]],
        max_nonfinite: int,
        ids: Callable[[int], list[str]],
    ):
        """Opens an empty or a continued window.

        Args:
          writer: Takes the means.
          progress: Shows them.
          every_steps: Steps between lines.
          window: What a checkpoint kept.
          max_nonfinite: Number of skipped steps in a row that stops the run.
          ids: Step, counted from 1 -> ids of its images.
        """
        self._writer, self._progress = writer, progress
        self._every_steps, self._max_nonfinite, self._ids = every_steps, max_nonfinite, ids
        self._pending: tuple[int, dict[str, Any]] | None = None
        self.window = list(window)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes what `make_train_step`'s step returned; `step` counts it."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the last step; raises `NonFiniteLoss` after too many skipped ones in a row."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.tree.map(lambda value: value.item(), jax.device_get(metrics))
        skips = metrics.pop("skips")
        # Without images the loss is 0, which would lower the mean.
        if metrics.pop("is_empty", False):
            log.warning("Step %d changes nothing: no image of its batch counts.", step)
        elif skips["in_row"]:
            self._note_skipped(step, metrics, skips)
        else:
            self.window.append(metrics)
        if step % self._every_steps == 0 and self.window:
            means = {
                f"train/{name}": sum(m[name] for m in self.window) / len(self.window)
                for name in metrics
            }
            means["train/lr"] = self.window[-1]["lr"]
            if skips["total"]:
                means["train/num_nonfinite"] = skips["total"]
            self.window.clear()
            self._writer.write(step, means | self._progress.report(step, means))

    def _note_skipped(self, step: int, metrics: dict[str, float], skips: dict[str, int]) -> None:
        ids = self._ids(step)
        self._writer.write_skipped(step, metrics, ids)
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        log.warning(
            "Step %d is skipped, %d in a row: %s; images %s, all of them in nonfinite.jsonl.",
            step, skips["in_row"], what, ", ".join(ids[:4]) + (", ..." if ids[4:] else ""),
        )  # fmt: skip
        if skips["in_row"] >= self._max_nonfinite:
            raise NonFiniteLoss(
                f"Step {step} diverged, as did all of the last {skips['in_row']} "
                f"(train.max_nonfinite={self._max_nonfinite}): {what}. Their images are in "
                "nonfinite.jsonl. Start again in another --workdir with a lower optim.lr, a longer "
                "optim.warmup_steps or a smaller optim.clip_norm (0 is none)."
            )


def _drop_lines(path: Path, step: int, again: Sequence[str] = ()) -> None:
    """Removes the lines that will be written again, and a last line cut by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            written = json.loads(line)
        except ValueError:  # cut by a kill, or blank after a power loss: so are all lines after it
            break
        if not line.endswith("\n"):
            break
        is_again = any(name.split("/")[0] in again for name in written)
        if written["step"] < step or (written["step"] == step and not is_again):
            kept.append(line)
    with written_aside(path) as aside:
        aside.write_text("".join(kept))
