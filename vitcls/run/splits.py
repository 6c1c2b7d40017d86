"""The splits that a run trains on and is measured by."""

import functools
import logging

from ml_collections import ConfigDict

from vitcls.config.parse import parse_fold
from vitcls.data import sources
from vitcls.data.cache import cached
from vitcls.data.sources import classes
from vitcls.data.sources.division import DIVISIONS
from vitcls.data.sources.split import check_no_class_is_empty, num_shared
from vitcls.errors import UserError

log = logging.getLogger("vitcls")


def open_splits(
    config: ConfigDict, *, is_continued: bool = False
) -> tuple[sources.Split, dict[str, sources.Split]]:
    """Returns the split to train on, and by name those that are evaluated.

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
    if not is_thinned:  # whole, and so the same on disk for runs with other seeds
        train = keep(train)
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
        _check_apart(config, train, evaluated)
    except UserError as error:
        if not is_continued:
            raise
        log.warning("%s (The run began so, and continues.)", error)
    if config.eval.select_metric == "top5_accuracy" and len(train.class_names) <= 5:
        raise UserError(
            f"eval.select_metric='top5_accuracy' says nothing with {len(train.class_names)} "
            "classes; use 'accuracy'."
        )
    return train, evaluated


def _check_apart(
    config: ConfigDict, train: sources.Split, evaluated: dict[str, sources.Split]
) -> None:
    """Refuses images that both fit and choose, fit and measure, or choose and measure."""
    select, eval_splits = config.eval.select_split, config.data.eval_splits
    for name, split in evaluated.items():
        if shared := num_shared(split, train):
            field, does = "data.eval_splits", "measure it"
            if name == select:
                field, does = "eval.select_split", "choose its checkpoint"
            raise UserError(
                f"{name!r} of {field} shares {shared} of its {len(split)} images with "
                f"data.train_split={config.data.train_split!r}: images that a network is trained "
                f"on cannot {does}. Name a split of other images, such as 'holdout', or a "
                "data.train_split without them."
            )
    for name in eval_splits if select else ():
        if num_shared(evaluated[name], evaluated[select]):
            raise UserError(
                f"eval.select_split={select!r} shares images with {name!r} of data.eval_splits: "
                "images that choose the checkpoint cannot measure it. Select on 'holdout'."
            )
