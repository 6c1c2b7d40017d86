"""The splits that a run trains on and is measured by."""

import functools
import logging

from ml_collections import ConfigDict

from vitcls.config.parse import parse_fold
from vitcls.data import sources
from vitcls.data.cache import cached
from vitcls.data.sources import classes
from vitcls.data.sources.division import DIVISIONS
from vitcls.data.sources.overlap import check_apart
from vitcls.data.sources.split import check_no_class_is_empty
from vitcls.errors import UserError

log = logging.getLogger("vitcls")


def open_splits(
    config: ConfigDict, *, is_continued: bool = False
) -> tuple[sources.Split, dict[str, sources.Split]]:
    """Returns the split to train on, and the splits that are evaluated by name.

    Args:
      config: The run's.
      is_continued: Whether the run began already. A warning then replaces the error about classes
        without training images, and about images that are both trained on and evaluated.
    """
    data = config.data
    chosen = dict(seed=config.train.seed, division=data.division or DIVISIONS[0])
    open_split = functools.partial(
        sources.open_split,
        data.source,
        data_dir=data.data_dir or None,
        division=chosen["division"],
    )
    keep = functools.partial(cached, where=data.cache)
    train, evaluated = open_split(data.train_split), {}
    is_thinned = data.per_class or data.long_tail
    # The whole split is the same for all seeds, so that runs share its cache on disk.
    if not is_thinned:
        train = keep(train)
    # The hold-out is taken before classes are thinned, so that it is the same for all sizes.
    if "holdout" in (config.eval.select_split, *data.eval_splits):
        if data.fold:
            train, evaluated["holdout"] = sources.take_fold(train, *parse_fold(data.fold), **chosen)
        elif data.holdout:
            train, evaluated["holdout"] = sources.hold_out(train, data.holdout, **chosen)
    if is_thinned:
        if data.per_class:
            train = sources.take_per_class(train, data.per_class, **chosen)
        else:
            train = sources.take_long_tail(train, data.long_tail, **chosen)
        train = keep(train)
        evaluated = {name: keep(split) for name, split in evaluated.items()}
    for name in [config.eval.select_split, *data.eval_splits]:
        if name and name not in evaluated:
            evaluated[name] = keep(open_split(name))
    evaluated = {name: classes.align(train, split) for name, split in evaluated.items()}
    try:
        check_no_class_is_empty(train)
        check_apart(
            train, evaluated, train_name=data.train_split,
            select=config.eval.select_split, measured=data.eval_splits,
        )  # fmt: skip
    except UserError as error:
        if not is_continued:
            raise
        log.warning("%s (The run began so, and continues.)", error)
    if config.eval.select_metric == "top5_accuracy" and len(train.class_names) <= 5:
        raise UserError(
            f"eval.select_metric='top5_accuracy' is always 1 with {len(train.class_names)} "
            "classes; use 'accuracy'."
        )
    return train, evaluated
