"""Ranks checkpoints for a data set by cheap heads on a held-out part of its training split.

N held-out images, C candidates, R resamples.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitcls.analysis import classification, paired
from vitcls.analysis.candidates import Candidate, fit_heads, measure_costs
from vitcls.analysis.classification import Estimate
from vitcls.data import sources
from vitcls.data.sources.split import Split
from vitcls.errors import NotFinite, StorageError, UserError
from vitcls.probe import features
from vitcls.provenance import seen

log = logging.getLogger("vitcls")

# Share of the images that are not held out: it selects the hyper-parameters, so that the held-out
# part measures only.
_SELECTS = 0.1


@dataclasses.dataclass(frozen=True)
class Row:
    """A candidate compared with the choice.

    Attributes:
      candidate: The measurements.
      probe: Accuracy of the linear probe, mean over its seeds.
      knn: Accuracy of nearest neighbours.
      behind: Lead of the choice's linear probe; not below 0.
      p: p value of the test that it is as good as the choice, corrected for the number of tests
        (Holm); NaN for the choice itself.
    """

    candidate: Candidate
    probe: Estimate
    knn: Estimate
    behind: Estimate
    p: float

    @property
    def is_worse(self) -> bool:
        """Whether it can be told apart from the choice."""
        return self.p <= 1 - paired.LEVEL


@dataclasses.dataclass(frozen=True)
class Selection:
    """The ranking.

    Attributes:
      rows: The choice first, then by accuracy.
      left_out: Candidates that cannot be used, and why.
      num_images: N.
      num_train: Images that the heads were fitted on.
    """

    rows: list[Row]
    left_out: dict[str, str]
    num_images: int
    num_train: int


def divide(split: Split, *, holdout: float, per_class: int, seed: int) -> dict[str, Split]:
    """Divides `split` into "train", "validation" (selects hyper-parameters) and "test" (ranks).

    All parts are stratified.

    Args:
      split: The training split.
      holdout: Share of the images that rank.
      per_class: Images of each class to fit on; 0: all that remain.
      seed: Seed of the random choice of images.

    Raises:
      UserError: There are too few images.
    """
    rest, held = sources.hold_out(split, holdout, seed=seed)
    train, selects = sources.hold_out(rest, _SELECTS, seed=seed)
    if per_class:
        train = sources.take_per_class(train, per_class, seed=seed)
    return {"train": train, "validation": selects, "test": held}


def select(
    names: Sequence[str],
    parts: dict[str, Split],
    *,
    folder: Path,
    num_epochs: int,
    batch_size: int = 0,
    source: str = "",
    data_dir: str | None = None,
) -> Selection:
    """Measures all candidates, one after the other, and ranks those that can be used.

    Args:
      names: As `pretrained.load` takes them.
      parts: The result of `divide`.
      folder: Folder of the features; existing ones are not computed again.
      num_epochs: Epochs of the linear probe.
      batch_size: Images at a time over all devices; 0: chosen by their memory.
      source: Data set of the parts, or "" if unknown: runs that were trained on images that rank
        are left out.
      data_dir: Folder of all tfds data.

    Raises:
      UserError: No candidate can be used, or an image cannot be decoded.
    """
    measured, left_out = [], {}
    for number, name in enumerate(names, 1):
        log.info("Candidate %d of %d: %s", number, len(names), name)
        try:
            _check_has_not_seen(name, parts["test"], source, data_dir)
            measured.append(
                _measure(name, parts, folder=folder, num_epochs=num_epochs, batch_size=batch_size)
            )
        except _Unusable as error:
            left_out[name] = str(error)
            log.warning("%s is left out: %s", name, error)
    if not measured:
        listed = "\n".join(f"  {name}: {why}" for name, why in left_out.items())
        raise UserError(f"None of the candidates can be used:\n{listed}")
    return Selection(rank(measured), left_out, len(parts["test"]), len(parts["train"]))


class _Unusable(Exception):
    """A fault of one candidate: the others can be ranked."""


def _check_has_not_seen(name: str, split: Split, source: str, data_dir: str | None) -> None:
    known = seen.find(name, source, data_dir=data_dir) if source else None
    if known is not None and (shared := known.num_trained_on(split, source)):
        raise _Unusable(
            f"It was trained on {shared} of the {len(split)} images that rank. vitcls.evaluate "
            "measures it on the test split."
        )


def _measure(
    name: str, parts: dict[str, Split], *, folder: Path, num_epochs: int, batch_size: int
) -> Candidate:
    try:
        backbone = features.load_backbone(name)
    except (UserError, StorageError, OSError) as error:
        raise _Unusable(str(error)) from error
    costs = measure_costs(backbone, num_images=max(map(len, parts.values())), batch_size=batch_size)
    try:
        found = {
            part: features.features_of(backbone, split, folder=folder, batch_size=costs.batch_size)
            for part, split in parts.items()
        }
    except NotFinite as error:
        raise _Unusable(str(error)) from error
    num_classes = len(parts["train"].class_names)
    measured = fit_heads(name, found, costs, num_classes=num_classes, num_epochs=num_epochs)
    log.info(
        "%s: linear probe %.4f, nearest neighbours %.4f, %.1f images/s.",
        name, measured.probe.mean() / measured.num_seeds, measured.knn.mean(),
        costs.images_per_second,
    )  # fmt: skip
    return measured


def rank(candidates: Sequence[Candidate]) -> list[Row]:
    """Compares the candidates with the best of them, which comes first.

    The order is by linear probe, then nearest neighbours, then cost, then as given. Intervals are
    percentiles over resamples of the held-out images, the same for all. The test is
    `paired.sign_flips` of the number of seeds that are right.

    Args:
      candidates: One or more, measured on the same images.
    """
    order = sorted(candidates, key=lambda c: (-c.probe.sum(), -c.knn.sum(), c.costs.gflops))
    choice, *others = order
    counts = {}
    for i, one in enumerate(order):
        counts[f"{i} probe"] = one.probe
        counts[f"{i} knn"] = one.knn * one.num_seeds
        counts[f"{i} behind"] = choice.probe - one.probe
    estimates = _estimate(counts, max_count=choice.num_seeds)
    p_values = paired.holm([paired.sign_flips(choice.probe - one.probe) for one in others])
    return [
        Row(one, *(estimates[f"{i} {name}"] for name in ("probe", "knn", "behind")), p)
        for i, (one, p) in enumerate(zip(order, [math.nan, *p_values], strict=True))
    ]


def _estimate(counts: dict[str, np.ndarray], *, max_count: int) -> dict[str, Estimate]:
    """The means of integers (N,) up to `max_count`, as shares of it, with their intervals.

    If all are right, or all wrong, the interval is an exact bound: resamples would not vary.
    """
    columns = np.stack(list(counts.values()), axis=1).astype(np.float64)
    num_images = len(columns)

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        # Sums of integers are exact, so that equal candidates stay equal.
        return dict(zip(counts, (weights @ columns / (max_count * num_images)).T, strict=True))

    found = classification.estimate(
        [compute], num_images, num_resamples=classification.NUM_RESAMPLES, seed=0
    )
    surely = classification.surely_above(num_images, num_images)
    for name, one in found.items():
        if not name.endswith("behind") and one.value in (0, 1):
            low, high = (surely, 1.0) if one.value else (0.0, 1 - surely)
            found[name] = Estimate(one.value, low, high)
    return found


def sentence(found: Selection) -> str:
    """Names the choice, the candidates that cannot be told apart from it, and the cheapest."""
    choice, *others = found.rows
    name, costs = choice.candidate.name, choice.candidate.costs
    text = (
        f"Take {name}: its linear probe is right on {100 * choice.probe.value:.1f} % of "
        f"{found.num_images} held-out images (95 % interval {100 * choice.probe.low:.1f} to "
        f"{100 * choice.probe.high:.1f})."
    )
    if not others:
        return f"{text} Nothing else is compared with it."
    alike = [row.candidate for row in others if not row.is_worse]
    if alike:
        text += f" Cannot be told apart from it: {', '.join(one.name for one in alike)}."
        cheapest = min(alike, key=lambda one: one.costs.gflops)
        if cheapest.costs.gflops < costs.gflops:
            text += (
                f" The cheapest of these is {cheapest.name}: {cheapest.costs.gflops:.3g} GFLOPs "
                f"for an image instead of {costs.gflops:.3g}."
            )
    elif len(others) == 1:
        text += " It is better than the other one."
    else:
        text += f" It is better than each of the {len(others)} others."
    best = max(row.knn.value for row in found.rows)
    if choice.knn.value < best:
        row = next(row for row in found.rows if row.knn.value == best)
        text += f" By nearest neighbours {row.candidate.name} would be first."
    return text
