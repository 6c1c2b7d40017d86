"""The rule that is kept with a checkpoint: `decision.json`, written, found and described."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vitcls.decision.rule import Rule, fit_rule, highest_target
from vitcls.errors import UserError
from vitcls.files import read_json, write_json
from vitcls.folders.workdir import Workdir
from vitcls.pretrained.run import find_run

log = logging.getLogger("vitcls")

NAME = "decision.json"
_FEW_IMAGES = 30


def write_at_end(workdir: Workdir, config: ConfigDict, results: dict[str, Any]) -> None:
    """Chooses the rule of a run that ends, or removes one that an earlier end left.

    Args:
      workdir: Has the predictions for the hold-out.
      config: The run's; without a target the run keeps no rule.
      results: The run's.
    """
    targets = {
        "target_precision": config.eval.target_precision,
        "target_coverage": config.eval.target_coverage,
    }
    targets = {name: value for name, value in targets.items() if value}
    if not targets:
        workdir.decision.unlink(missing_ok=True)
        return
    split = config.eval.select_split
    with np.load(workdir.predictions / f"{split}.npz", allow_pickle=False) as arrays:
        labels, logits = arrays["labels"], arrays["logits"]
    origin = {"step": results["selected_step"], "split": split, "tta": config.eval.tta}
    write_json(workdir.decision, decide(labels, logits, origin=origin, targets=targets))


def decide(
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    origin: dict[str, Any],
    targets: dict[str, float],
    score: str = "probability",
) -> dict[str, Any]:
    """Returns the content of `decision.json`, and logs what it promises.

    Args:
      labels: Integers (N,) of the hold-out.
      logits: Floats (N, K).
      origin: "step", "split" and "tta": whose logits these are.
      targets: "target_precision" or "target_coverage".
      score: See `Rule`.
    """
    if len(labels) < _FEW_IMAGES:
        log.warning(
            "%s has %d images, too few to choose a threshold by; with %d or more its promise says "
            "something.", origin["split"], len(labels), _FEW_IMAGES,
        )  # fmt: skip
    rule = fit_rule(labels, logits, **targets, score=score)
    content = origin | targets | dataclasses.asdict(rule) | rule.measure(labels, logits)
    log.info("With --reject %s", describe(content))
    if rule.threshold is None:
        highest = highest_target(labels, logits, rule)
        log.warning(
            "No threshold promises a precision of %g on the %d images of %s: --reject rejects "
            "every image. The highest target that they can promise is %g. Hold out more images "
            "(data.holdout), or choose again for this run: "
            "python -m vitcls.analysis.decide WORKDIR --target_precision=%g",
            targets["target_precision"], len(labels), origin["split"], highest, highest,
        )  # fmt: skip
    return content


def describe(content: dict[str, Any]) -> str:
    """Returns coverage and precision as a sentence's end."""
    coverage, precision = content["coverage"], content["precision"]
    text = f"{share(coverage)} of images are answered"
    if precision["value"] is not None:
        text += f", {share(precision)} of these rightly"
    return f"{text}: {content['num_images']} images of {content['split']}."


def share(one: dict[str, float]) -> str:
    """Returns a share with its interval, in percent."""
    ends = f"95 % interval {100 * one['low']:.1f} to {100 * one['high']:.1f}"
    return f"{100 * one['value']:.1f} % ({ends})"


def find(checkpoint: str | Path) -> dict[str, Any] | None:
    """Returns the content of a checkpoint's `decision.json`; None: it has none.

    A rule that was chosen for other weights of the run is none, with a warning.

    Args:
      checkpoint: As `pretrained.load` takes it.

    Raises:
      UserError: the file is damaged.
    """
    run = find_run(checkpoint)
    path = (Path(checkpoint).expanduser() if run is None else run.model) / NAME
    if not path.is_file():
        return None
    content = read(path)
    if run is not None and content.get("step") != (step := run.step()):
        log.warning(
            "%s was chosen for step %s, and %s is step %d: it is not used.",
            path, content.get("step"), checkpoint, step,
        )  # fmt: skip
        return None
    return content


def read(path: Path) -> dict[str, Any]:
    """Returns the content of a `decision.json`; raises `UserError` if it is damaged."""
    remedy = "choose it again with vitcls.analysis.decide, or remove it to do without"
    content = read_json(path, remedy=remedy)
    try:
        rule_of(content)
        describe(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}): {remedy}.") from error
    return content


def require(checkpoint: str | Path, *, tta: str = "none") -> tuple[Rule, dict[str, Any]]:
    """Returns the rule of a checkpoint and the content of its file, for `--reject`.

    Args:
      checkpoint: As `pretrained.load` takes it.
      tta: How the images are shown; a warning says if the rule was chosen for another way.

    Raises:
      UserError: it has none.
    """
    content = find(checkpoint)
    if content is None:
        raise UserError(
            f"--reject needs a {NAME}, and {checkpoint} has none for these weights. Choose it on "
            "the hold-out of the run: python -m vitcls.analysis.decide WORKDIR "
            "--target_precision=0.95, or train with --config.eval.target_precision=0.95."
        )
    if content.get("tta", tta) != tta:
        log.warning(
            "The threshold was chosen with eval.tta=%r and is used with %r, so that its promise "
            "holds only roughly.", content["tta"], tta,
        )  # fmt: skip
    if content["threshold"] is None:
        log.warning("Its target could not be promised: every image is rejected.")
    return rule_of(content), content


def rule_of(content: dict[str, Any]) -> Rule:
    """Returns the rule in a file's content; raises `KeyError` or `UserError` if it has none."""
    return Rule(*(content[field.name] for field in dataclasses.fields(Rule)))
