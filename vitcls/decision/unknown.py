"""Which score tells images of unknown classes from those of the hold-out."""

import logging
from typing import Any

import numpy as np

from vitcls.decision import kept
from vitcls.decision.rule import SCORES, auroc, fit_rule, interval
from vitcls.errors import UserError

log = logging.getLogger("vitcls")


def decide(
    labels: np.ndarray,
    logits: np.ndarray,
    unknown: np.ndarray | None,
    *,
    origin: dict[str, Any],
    targets: dict[str, float],
) -> dict[str, Any]:
    """Returns the content of `decision.json`, with the score that suits the unknown images.

    The threshold is chosen on the hold-out alone, so the rate of unknown images that it rejects is
    optimistic only by the choice between two scores.

    Args:
      labels: Integers (N,) of the hold-out.
      logits: Floats (N, K).
      unknown: Logits of images of none of the classes, (M, K); None: there are none.
      origin: See `kept.decide`.
      targets: See `kept.decide`.

    Raises:
      UserError: the numbers of classes differ.
    """
    if unknown is None:
        return kept.decide(labels, logits, origin=origin, targets=targets)
    if unknown.shape[1] != logits.shape[1]:
        raise UserError(
            f"--unknown has the logits of {unknown.shape[1]} classes, and the run has "
            f"{logits.shape[1]}; make it with vitcls.predict and the same checkpoint."
        )
    rules = {score: fit_rule(labels, logits, **targets, score=score) for score in SCORES}
    areas = {name: auroc(one.scores(logits), one.scores(unknown)) for name, one in rules.items()}
    score = max(areas, key=areas.get)
    content = kept.decide(labels, logits, origin=origin, targets=targets, score=score)
    num_rejected = int((~rules[score].is_answered(unknown)).sum())
    rejected = interval(num_rejected, len(unknown))
    log.info(
        "The %s tells %d unknown images from those of %s better (areas under the ROC curve: %s). "
        "%s of the unknown images are rejected.",
        score, len(unknown), origin["split"],
        ", ".join(f"{name} {area:.4f}" for name, area in areas.items()), kept.share(rejected),
    )  # fmt: skip
    return content | {"unknown": {"num_images": len(unknown), "auroc": areas, "rejected": rejected}}
