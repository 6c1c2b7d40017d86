"""Refuses images that would measure, or choose, what they have trained."""

from collections.abc import Sequence

from vitcls.data.sources.split import Split, num_shared
from vitcls.errors import UserError


def check_apart(
    train: Split,
    evaluated: dict[str, Split],
    *,
    train_name: str,
    select: str,
    measured: Sequence[str],
) -> None:
    """Raises `UserError` if images that train also choose or measure, or those that choose measure.

    Args:
      train: The images to train on.
      evaluated: The evaluated splits by name.
      train_name: data.train_split, for the message.
      select: Name of the split that chooses the checkpoint; "": none does.
      measured: Names of the splits that measure it.
    """
    for name, split in evaluated.items():
        if shared := num_shared(split, train):
            field, does = "data.eval_splits", "measure it"
            if name == select:
                field, does = "eval.select_split", "choose its checkpoint"
            raise UserError(
                f"{name!r} of {field} shares {shared} of its {len(split)} images with "
                f"data.train_split={train_name!r}: images that a network is trained on cannot "
                f"{does}. Name a split of other images, such as 'holdout', or a data.train_split "
                "without them."
            )
    for name in measured if select else ():
        if num_shared(evaluated[name], evaluated[select]):
            raise UserError(
                f"eval.select_split={select!r} shares images with {name!r} of data.eval_splits: "
                "images that choose the checkpoint cannot measure it. Select on 'holdout'."
            )
