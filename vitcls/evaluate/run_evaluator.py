"""The evaluations of a run: between two steps those that choose a checkpoint, and all at its end.

K classes.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.data import loader, sources
from vitcls.errors import Interrupted, NonFiniteLoss
from vitcls.evaluate.exact import check_logits, evaluate
from vitcls.logs.writers import MetricWriter
from vitcls.processes.signals import StopRequest
from vitcls.processes.watchdog import Watchdog
from vitcls.run import records
from vitcls.run.program import Program
from vitcls.step.metrics import select_score

log = logging.getLogger("vitcls")


class RunEvaluator:
    """Evaluates the splits of a run, between two steps and at its end."""

    def __init__(
        self,
        config: ConfigDict,
        program: Program,
        processor: pretrained.Processor,
        splits: dict[str, sources.Split],
        *,
        class_counts: np.ndarray,
        loading: dict[str, Any],
        stop: StopRequest,
        watchdog: Watchdog,
        writer: MetricWriter,
    ):
        """Takes what is in use already; nothing is read or computed yet.

        Args:
          config: The run's, as `resolve` returns it.
          program: Has the evaluation step, and the devices.
          processor: How the images are prepared.
          splits: By name, those that are evaluated.
          class_counts: Training images of each class, int (K,).
          loading: More arguments of `loader.eval_batches`.
          stop: Asked after each batch, as an evaluation takes long.
          watchdog: Told of each batch.
          writer: Takes the metrics.
        """
        self._config, self._program, self._splits = config, program, splits
        self._transform, self._class_counts, self._loading = processor.pixels, class_counts, loading
        self._stop, self._watchdog, self._writer = stop, watchdog, writer

    def selection_score(self, step: int, variables: Any) -> float:
        """Returns the score, higher is better, by which the checkpoint of `step` is chosen.

        Raises:
          Interrupted: a signal asks the run to stop.
        """
        name = self._config.eval.select_split
        summary, _ = self._evaluate(name, variables)
        self._write(step, name, summary)
        log.info(
            "step %d: %s accuracy %.4f, loss %.4f (%s)",
            step, name, summary["accuracy"], summary["loss"], records.count_images(summary),
        )  # fmt: skip
        return select_score(summary, self._config.eval.select_metric)

    def evaluate_all(self, step: int, variables: Any, folder: Path) -> dict[str, dict[str, float]]:
        """Returns the metrics of all splits by name, and writes the predictions into `folder`.

        Args:
          step: The last step of the run.
          variables: The network's, of the step that was selected.
          folder: Gets one npz file for each split.

        Raises:
          Interrupted: a signal asks the run to stop.
          NonFiniteLoss: logits are not finite.
        """
        select, summaries = self._config.eval.select_split, {}
        for name in dict.fromkeys([*self._config.data.eval_splits, *filter(None, [select])]):
            split = self._splits[name]
            summaries[name], predictions = self._evaluate(name, variables, keep_predictions=True)
            check_logits(predictions, split, error=NonFiniteLoss)
            if jax.process_index() == 0:
                ids = [split.id(i) for i in predictions.pop("index").tolist()]
                records.save_predictions(folder / f"{name}.npz", ids=ids, **predictions)
            # The selection split has its line of this step already.
            if name != select:
                self._write(step, name, summaries[name])
        return summaries

    def _evaluate(self, name: str, variables: Any, **options: Any) -> tuple[dict, dict]:
        batches = loader.eval_batches(
            self._splits[name],
            global_batch_size=self._config.eval.batch_size,
            transform=self._transform,
            **self._loading,
        )
        # The first batch compiles the evaluation step, which takes longer than a batch may.
        self._watchdog.expect("compile")
        return evaluate(
            self._program.eval_step, variables, batches,
            mesh=self._program.mesh, name=name, num_examples=len(self._splits[name]),
            train_counts=self._class_counts, after_batch=self._after_batch, **options,
        )  # fmt: skip

    def _after_batch(self) -> None:
        self._watchdog.expect("eval")
        if self._stop.poll():
            raise Interrupted(
                f"{self._stop.name}: an evaluation stopped; run the same command again."
            )

    def _write(self, step: int, name: str, summary: dict[str, float]) -> None:
        self._writer.write(step, {f"{name}/{metric}": x for metric, x in summary.items()})
