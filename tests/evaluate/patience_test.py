"""When a run ends early."""

import dataclasses

import pytest

from vitcls.checkpoints.saved import Saved
from vitcls.evaluate.patience import Patience


def steps_of(limit: int, scores: list[float], saved: Saved | None = None) -> list[int]:
    """The steps that are done when each is evaluated."""
    patience, done = Patience(limit, saved or Saved()), []
    for step in patience.until_over(range(1, len(scores) + 1)):
        done.append(step)
        patience.add(step, scores[step - 1])
    return done


@pytest.mark.parametrize(
    ("limit", "scores", "last"),
    [
        (0, [0.5, 0.4, 0.4, 0.4], 4),
        (2, [0.5, 0.6, 0.7, 0.8], 4),
        (2, [0.5, 0.4, 0.4, 0.9], 3),
        (2, [0.5, 0.5, 0.5, 0.9], 3),  # an equal score is not a better one
        (2, [0.5, 0.4, 0.6, 0.5, 0.5], 5),
        (1, [float("-inf"), float("-inf"), 0.9], 2),
    ],
)
def test_a_run_ends_after_so_many_scores_that_are_not_better(limit, scores, last):
    assert steps_of(limit, scores) == list(range(1, last + 1))


def test_the_counts_of_a_checkpoint_are_continued():
    patience = Patience(2, Saved())
    for step, score in enumerate([0.5, 0.4], 1):
        patience.add(step, score)
    saved = Saved.from_json(dataclasses.replace(Saved(), **patience.counts()).to_json())
    assert steps_of(2, [0.4, 0.9], saved) == [1]
    assert steps_of(2, [0.6, 0.5, 0.5, 0.9], saved) == [1, 2, 3]
