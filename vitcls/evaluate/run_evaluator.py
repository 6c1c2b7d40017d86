"""The evaluations of a run: those that choose a checkpoint during training, and all at its end."""

import logging
from pathlib import Path
from typing import Any

import jax

from vitcls.data.skipped import Skipped
from vitcls.errors import Interrupted, NonFiniteLoss
from vitcls.evaluate.exact import check_logits, evaluate
from vitcls.evaluate.patience import Patience
from vitcls.evaluate.summary import select_score
from vitcls.logs.writers import MetricWriter
from vitcls.processes.signals import StopRequest
from vitcls.processes.watchdog import Watchdog
from vitcls.provenance import records
from vitcls.provenance.results import count_images
from vitcls.run.opened import Run
from vitcls.run.program import Program

log = logging.getLogger("vitcls")


class RunEvaluator:
    """Evaluates the splits of a run, between two steps and at its end."""

    def __init__(
        self,
        run: Run,
        program: Program,
        skipped: Skipped | None,
        stop: StopRequest,
        watchdog: Watchdog,
        writer: MetricWriter,
        patience: Patience,
    ):
        """Keeps its arguments; nothing is read or computed yet.

        Args:
          run: Has the splits.
          program: Has the evaluation step, and the devices.
          skipped: List of images that cannot be decoded; None: such an image is an error.
          stop: Asked after each batch, because an evaluation takes long.
          watchdog: Told of each batch.
          writer: Writes the metrics.
          patience: Counts the scores.
        """
        self._run, self._program, self._skipped = run, program, skipped
        self._stop, self._watchdog, self._writer = stop, watchdog, writer
        self._patience = patience
        self._class_counts = run.train_split.class_counts()

    def selection_score(self, step: int, variables: Any) -> float:
        """Returns the score, higher is better, by which the checkpoint of `step` is chosen.

        Raises:
          Interrupted: a signal asks the run to stop.
        """
        name = self._run.config.eval.select_split
        summary, _ = self._evaluate(name, variables)
        self._write(step, name, summary)
        log.info(
            "step %d: %s accuracy %.4f, loss %.4f (%s)",
            step, name, summary["accuracy"], summary["loss"], count_images(summary),
        )  # fmt: skip
        score = select_score(summary, self._run.config.eval.select_metric)
        self._patience.add(step, score)
        return score

    def due_score(self, step: int, variables: Any) -> float | None:
        """Returns the `selection_score`; None: a signal asks the run to stop."""
        # A run that is stopped saves first: there is more to lose than a score.
        if self._stop.name:
            return None
        try:
            return self.selection_score(step, variables)
        except Interrupted:
            return None

    def evaluate_all(self, step: int, variables: Any, folder: Path) -> dict[str, dict[str, Any]]:
        """Returns metrics and fingerprint of each split by name; writes predictions into `folder`.

        Args:
          step: The last step of the run.
          variables: The network's, of the step that was selected.
          folder: Gets one npz file for each split.

        Raises:
          Interrupted: a signal asks the run to stop.
          NonFiniteLoss: logits are not finite.
        """
        select, summaries = self._run.config.eval.select_split, {}
        for name in dict.fromkeys([*self._run.config.data.eval_splits, *filter(None, [select])]):
            split = self._run.eval_splits[name]
            summaries[name], predictions = self._evaluate(name, variables, keep_predictions=True)
            check_logits(predictions, split, error=NonFiniteLoss)
            if jax.process_index() == 0:
                ids = [split.id(i) for i in predictions.pop("index").tolist()]
                records.save_predictions(folder / f"{name}.npz", ids=ids, **predictions)
            # The selection split has its line of this step already.
            if name != select:
                self._write(step, name, summaries[name])
            summaries[name]["fingerprint"] = split.fingerprint
        return summaries

    def _evaluate(self, name: str, variables: Any, **options: Any) -> tuple[dict, dict]:
        batches = self._run.eval_batches(name, skipped=self._skipped)
        # The first batch compiles the evaluation step, which takes longer than a batch may.
        self._watchdog.expect("compile")
        return evaluate(
            self._program.eval_step, variables, batches,
            mesh=self._program.mesh, name=name, num_examples=len(self._run.eval_splits[name]),
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
