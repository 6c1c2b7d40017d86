"""Compares groups of runs on the images of one split.

N images, S runs of a group, R resamples.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vitcls.analysis import classification, paired, weighted
from vitcls.analysis.groups import Group, find_workdirs, group_by_config, why_unfinished
from vitcls.analysis.predictions import Predictions, read_predictions
from vitcls.analysis.run import read_run
from vitcls.errors import UserError
from vitcls.folders.workdir import Workdir

METRICS = (
    "accuracy", "top5_accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "macro_f1",
    "log_loss", "brier",
)  # fmt: skip
LOWER_IS_BETTER = ("log_loss", "brier")
# Under these metrics an image is right or wrong, as McNemar's test needs.
_RANKS = {"accuracy": 1, "top5_accuracy": 5}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run's predictions, reduced to what comparing needs.

    Attributes:
      metric: The metric as a function of the images' weights, see `weighted`.
      is_right: bool (N,) for metrics that count right images, else None.
      images: Digest of the images' ids and labels.
      num_images: N.
    """

    metric: weighted.Metric
    is_right: np.ndarray | None
    images: str
    num_images: int

    @property
    def value(self) -> float:
        """The metric with every image counted once."""
        return float(self.metric(np.ones((1, self.num_images)))[0])


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two compared groups; differences are positive if `a` is better.

    Attributes:
      a: The first group.
      b: The second group.
      difference: None if the two cannot be compared.
      modelled: The sources of variation that count, or why nothing is compared.
      mcnemar: p for the two runs of each seed, by seed; for single runs, p for these two.
      corrected: p, corrected for the number of comparisons.
      sentence: The conclusion.
    """

    a: Group
    b: Group
    difference: paired.Difference | None
    modelled: str
    mcnemar: dict[int, float]
    corrected: float = math.nan
    sentence: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result; its lists hold the compared runs.

    Attributes:
      split: The split.
      metric: One of `METRICS`.
      workdirs: The folder of each run.
      groups: The groups, one or more.
      values: The metric of each run.
      histories: The lines of each run's `metrics.jsonl`.
      pairs: All pairs of groups, the clearest difference first.
      left_out: Runs that are not compared, and why.
      notes: Remarks for the reader, a sentence each.
    """

    split: str
    metric: str
    workdirs: list[Path]
    groups: list[Group]
    values: list[float]
    histories: list[list[dict[str, Any]]]
    pairs: list[Pair]
    left_out: dict[Path, str]
    notes: list[str]


def compare_runs(directories: Iterable[str], *, split: str, metric: str) -> Comparison:
    """Reads and compares all finished runs.

    Args:
      directories: Workdirs, and folders of workdirs such as launch.sweep makes.
      split: The split whose images are compared.
      metric: One of `METRICS`.

    Raises:
      UserError: A folder has no runs, or no run can be compared.
    """
    runs, measured, left_out = [], [], {}
    found = find_workdirs(directories)
    for workdir, state in tqdm(found.items(), "Reading runs", disable=None, leave=False):
        try:
            if not Workdir(workdir).config.is_file():
                raise UserError("config.json is missing: the run has not begun")
            run = read_run(workdir)
            if why := why_unfinished(run):
                raise UserError(why)
            of_split = (
                run.splits[split] if split in run.splits else read_predictions(workdir, split)
            )
            measured.append(measure(of_split, metric))
            # Predictions are large, and from here on `measured` stands for them.
            runs.append(dataclasses.replace(run, splits={}))
        except UserError as error:
            left_out[workdir] = f"{error} ({state})" if state else str(error)
    if not runs:
        listed = "\n".join(f"  {workdir}: {why}" for workdir, why in left_out.items())
        raise UserError(f"None of the runs can be compared:\n{listed}")
    groups = group_by_config([run.config for run in runs])
    kept = sorted(i for one in groups for i in one.runs)
    for i in set(range(len(runs))) - set(kept):
        left_out[runs[i].workdir] = "it has the config and the seed of another run"
    notes = []
    if split in {run.select_split for run in runs}:
        notes.append(f"Some of these runs chose their checkpoints on {split}: they look too good.")
    commits = {str(run.manifest.get("git_commit")) for run in runs}
    if len(commits) > 1:
        notes.append(f"The runs used several versions of the code: {', '.join(sorted(commits))}.")
    return Comparison(
        split=split,
        metric=metric,
        workdirs=[run.workdir for run in runs],
        groups=groups,
        values=[one.value for one in measured],
        histories=[run.history for run in runs],
        pairs=compare_groups(groups, measured, metric),
        left_out=left_out,
        notes=notes,
    )


def measure(found: Predictions, metric: str) -> Measured:
    """Reduces predictions to what comparing needs.

    Raises:
      UserError: The metric does not exist for so few classes, or an image occurs twice.
    """
    order = np.argsort(found.ids, kind="stable")
    ids, labels, logits = found.ids[order], found.labels[order], found.logits[order]
    if (ids[1:] == ids[:-1]).any():
        raise UserError("several images have the same id, so that images cannot be paired")
    is_mean = metric in ("accuracy", "top5_accuracy", "log_loss", "brier")
    family = (weighted.means if is_mean else weighted.by_class)(labels, logits)
    if metric not in family(np.ones((1, len(labels)))):
        raise UserError(f"{metric} needs more than 5 classes; there are {logits.shape[1]}")
    is_right = None
    if metric in _RANKS:
        is_right = weighted.ranks(labels, logits) < _RANKS[metric]
    names = "\n".join(ids.astype(str).tolist()).encode(errors="surrogatepass")
    digest = hashlib.sha256(names + labels.astype("<i8").tobytes()).hexdigest()
    return Measured(lambda weights: family(weights)[metric], is_right, digest, len(labels))


def compare_groups(groups: Sequence[Group], runs: Sequence[Measured], metric: str) -> list[Pair]:
    """Compares all pairs of groups; the clearest difference comes first.

    The p values are corrected for the number of pairs (Holm).

    Args:
      groups: The groups, whose `runs` are positions in `runs`.
      runs: All runs, measured by `metric`.
      metric: One of `METRICS`.
    """
    samples = _samples(groups, runs, sign=-1 if metric in LOWER_IS_BETTER else 1)
    pairs = [_compare_pair(a, b, samples, runs) for a, b in itertools.combinations(groups, 2)]
    tested = [i for i, pair in enumerate(pairs) if pair.difference]
    p_values = paired.holm([pairs[i].difference.p for i in tested])
    for i, corrected in zip(tested, p_values, strict=True):
        pairs[i] = dataclasses.replace(pairs[i], corrected=corrected)
    pairs.sort(key=lambda pair: (not pair.difference, pair.corrected))
    return [
        dataclasses.replace(pair, sentence=_sentence(pair, runs, metric, len(tested)))
        for pair in pairs
    ]


def _samples(
    groups: Sequence[Group], runs: Sequence[Measured], *, sign: int
) -> dict[str, paired.Sample]:
    """Samples by group name, for groups whose runs were all evaluated on the same images."""
    samples = {}
    for images in dict.fromkeys(run.images for run in runs):
        same = [g for g in groups if {runs[i].images for i in g.runs} == {images}]
        columns = [i for group in same for i in group.runs]
        if not columns:
            continue
        num_images = runs[columns[0]].num_images
        resampled = {i: [] for i in columns}
        for weights in classification.resamples(num_images, classification.NUM_RESAMPLES, seed=0):
            for i in columns:
                resampled[i].append(runs[i].metric(weights))
        for group in same:
            columns_of_group = [np.concatenate(resampled[i]) for i in group.runs]
            values = np.array([runs[i].value for i in group.runs])
            samples[group.name] = paired.Sample(
                sign * values, sign * np.stack(columns_of_group, axis=1)
            )
    return samples


def _compare_pair(
    a: Group, b: Group, samples: dict[str, paired.Sample], runs: Sequence[Measured]
) -> Pair:
    if len({runs[i].images for i in (*a.runs, *b.runs)}) > 1:
        return Pair(a, b, None, "not all of their runs were evaluated on the same images", {})
    same_seeds = a.seeds == b.seeds
    difference = paired.difference(samples[a.name], samples[b.name], same_seeds=same_seeds)
    is_single = len(a.runs) == len(b.runs) == 1
    matched = [
        (seed, i, j)
        for seed, i in zip(a.seeds, a.runs, strict=True)
        for other, j in zip(b.seeds, b.runs, strict=True)
        if seed == other or is_single
    ]
    mcnemar = {
        seed: paired.mcnemar(runs[i].is_right, runs[j].is_right)
        for seed, i, j in matched
        if runs[i].is_right is not None
    }
    # McNemar's test is exact; the other one takes the bootstrap's distribution for normal.
    if is_single and mcnemar:
        difference = dataclasses.replace(difference, p=mcnemar[a.seeds[0]])
    if not difference.seeds:
        modelled = "images, paired; not seeds, of which a group has only one"
    elif same_seeds:
        modelled = f"images and seeds, both paired ({len(a.seeds)} seeds in common)"
    else:
        modelled = f"images, paired, and seeds, unpaired ({len(a.seeds)} and {len(b.seeds)})"
    return Pair(a, b, difference, modelled, mcnemar)


def amount(value: float, metric: str, *, digits: int) -> str:
    """A difference as text; shares are in percentage points."""
    if metric not in LOWER_IS_BETTER:
        value = 100 * value
    return f"{round(value, digits) + 0:.{digits}f}"  # adding 0 turns -0.0 into 0.0


def _sentence(pair: Pair, runs: Sequence[Measured], metric: str, num_tests: int) -> str:
    a, b, found = pair.a, pair.b, pair.difference
    if found is None:
        return f"{a.label} and {b.label} cannot be compared: {pair.modelled}."
    if found.value < 0:
        a, b = b, a
    num_images = runs[a.runs[0]].num_images
    if not found.variance():
        return (
            f"{a.label} and {b.label} cannot be told apart: they are the same on each of "
            f"{num_images} images."
        )
    low, high = sorted(math.copysign(1, found.value) * end for end in found.interval())
    digits = 4 if metric in LOWER_IS_BETTER else 1 if high - low >= 0.01 else 2
    by = amount(abs(found.value), metric, digits=digits)
    by += "" if metric in LOWER_IS_BETTER else " points"
    ends = f"{amount(low, metric, digits=digits)} to {amount(high, metric, digits=digits)}"
    if pair.corrected <= 1 - paired.LEVEL:
        what = f"{a.label} is better than {b.label} by {by} (95 % interval {ends})"
        return f"{what}{_caveat(pair)}."
    seeming = ""
    if found.p <= 1 - paired.LEVEL:
        seeming = f", but one of {num_tests} comparisons, corrected p {pair.corrected:.2f}"
    return (
        f"{a.label} and {b.label} cannot be told apart ({by} in favour of {a.name}, 95 % interval "
        f"{ends}{seeming}): {_needed(found, num_images, num_tests)}."
    )


def _caveat(pair: Pair) -> str:
    ones = " and ".join(group.name for group in (pair.a, pair.b) if len(group.seeds) == 1)
    return f", as far as one seed of {ones} can say: others may differ" if ones else ""


def _needed(found: paired.Difference, num_images: int, num_tests: int) -> str:
    images = paired.images_needed(found, num_images, num_tests=num_tests)
    if not found.seeds:
        second = "a second seed would be needed, to know how much seeds differ"
        return second + (f", and about {images} images, not {num_images}" if images else "")
    if images is None:
        return "the mean difference is 0, which more seeds would not show"
    seeds = paired.seeds_needed(found, num_tests=num_tests)
    if seeds is None:
        return (
            f"more seeds would not help: {images} images or more, not {num_images}, would be needed"
        )
    if seeds == paired.MAX_SEEDS:
        return f"{seeds} or more seeds of each would be needed"
    return f"about {seeds} more seed{'s' * (seeds > 1)} of each would be needed"
