"""Ends a run whose selection score has stopped improving: `eval.patience`."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from vitcls.checkpoints.saved import Saved

log = logging.getLogger("vitcls")


class Patience:
    """Counts the evaluations since the best score.

    The counts are part of every checkpoint, so that a continued run ends at the same step.

    Attributes:
      best_score: The highest score so far; None: nothing was evaluated yet.
      num_worse: Number of evaluations since then without a higher score.
    """

    def __init__(self, limit: int, saved: Saved):
        """Takes `eval.patience`, 0 for no limit, and the counts of the run so far."""
        self._limit = limit
        self.best_score, self.num_worse = saved.best_score, saved.num_worse

    def counts(self) -> dict[str, Any]:
        """Returns the counts as a checkpoint keeps them, see `Saved`."""
        return {"best_score": self.best_score, "num_worse": self.num_worse}

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return 0 < self._limit <= self.num_worse

    def until_over(self, steps: Iterable[int]) -> Iterator[int]:
        """Yields the steps until the run ends."""
        for step in steps:
            if self.is_over:
                return
            yield step

    def add(self, step: int, score: float) -> None:
        """Counts the evaluation after a step."""
        if self.best_score is None or score > self.best_score:
            self.best_score, self.num_worse = score, 0
        else:
            self.num_worse += 1
        if self.is_over:
            log.info(
                "Training ends after step %d: the last %d evaluations were not better than the "
                "best one (eval.patience).", step, self.num_worse,
            )  # fmt: skip
