"""What a checkpoint says about its run, next to the arrays: the item `meta`."""

import dataclasses
from typing import Any

import jax

from vitcls.step.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Saved:
    """The progress of a run when a step was saved; the defaults are those of a new run.

    Attributes:
      lacks_score: Whether a signal ended the evaluation that this save was due for.
      data: Fingerprint of the split that is trained on.
      teacher: Hash of the teacher's weights; None: no distillation.
      num_passes: Passes that a step divides its batch into.
      seconds: Wall time of the run so far.
      images_per_second: Training speed; None: not measured.
      window: Metrics of the steps since the last line of metrics.
      skips: Number of steps that were skipped because their loss was not finite: `in_row`, `total`.
      num_empty: Steps without an image that counts.
      best_score, num_worse: As `evaluate.patience.Patience` counts them.
    """

    lacks_score: bool = False
    data: str = ""
    teacher: str | None = None
    num_passes: int = 1
    seconds: float = 0.0
    images_per_second: float | None = None
    window: list[dict[str, float]] = dataclasses.field(default_factory=list)
    skips: dict[str, int] = dataclasses.field(default_factory=dict)
    num_empty: int = 0
    best_score: float | None = None
    num_worse: int = 0

    def after(
        self,
        state: TrainState,
        window: list[dict[str, float]],
        counts: dict[str, Any],
        *,
        seconds: float,
        speed: float | None,
        lacks_score: bool,
    ) -> "Saved":
        """Returns the progress that `state` is at, so many seconds after this one.

        Args:
          state: The training state.
          window: Metrics of the steps since the last line of metrics.
          counts: Those of `evaluate.patience.Patience`.
          seconds: Wall time since this progress.
          speed: Training images per second; None: not measured.
          lacks_score: Whether a signal ended the evaluation that this save was due for.
        """
        return dataclasses.replace(
            self,
            lacks_score=lacks_score,
            seconds=self.seconds + seconds,
            images_per_second=speed,
            window=window,
            skips=jax.tree.map(int, state.skips),
            num_empty=int(state.num_empty),
            **counts,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name, as JSON can hold them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Saved":
        """Reads the result of `to_json`, also that of a version with fewer or with more fields."""
        # Checkpoints of earlier versions lack fields; those of later ones may have others.
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})
