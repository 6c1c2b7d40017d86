"""The folders below a directory of checkpoints: one per step, and the traces of failures.

A step's folder is named by its number. `STEP.orbax-checkpoint-tmp` is being written, the content of
`deleted` is being deleted, and `STEP.corrupt-NUMBER` was found damaged.
"""

import itertools
import logging
import shutil
from pathlib import Path

from vitcls.checkpoints import seal
from vitcls.errors import StorageError

log = logging.getLogger("vitcls")

TEMPORARY, DELETED, DAMAGED = ".orbax-checkpoint-tmp", "deleted", ".corrupt-"


def has_steps(directory: Path) -> bool:
    """Whether `directory`, which need not exist, holds a checkpoint, sound or damaged."""
    return directory.is_dir() and any(
        path.name.isdigit() or DAMAGED in path.name for path in directory.iterdir()
    )


def clear_away(directory: Path) -> None:
    """Deletes the files of saves and deletions that were interrupted."""
    for path in [*directory.glob(f"*{TEMPORARY}*"), directory / DELETED]:
        shutil.rmtree(path, ignore_errors=True)


def set_damaged_aside(directory: Path) -> None:
    """Renames the checkpoints that differ from their seals.

    Raises:
      StorageError: there are checkpoints, and all are damaged.
    """
    steps = sorted((path for path in directory.iterdir() if path.name.isdigit()), key=_number)
    damages = {path: seal.damage(path) for path in steps}
    for path, what in damages.items():
        if what is not None:
            # A step may be damaged again after it was saved anew.
            names = (f"{path.name}{DAMAGED}{number}" for number in itertools.count(1))
            aside = next(name for name in names if not (directory / name).exists())
            path.rename(directory / aside)
            log.error(
                "The checkpoint of step %s in %s is damaged: %s. It is set aside as %s.",
                path.name, directory, what, aside,
            )  # fmt: skip
    sound = [path.name for path, what in damages.items() if what is None]
    if len(sound) < len(steps) and sound:
        log.error("The newest sound checkpoint is that of step %s.", sound[-1])
    if not sound and has_steps(directory):
        raise StorageError(
            f"All checkpoints in {directory} are damaged: *{DAMAGED}*. Put a sound copy of one "
            "there, named by its step, and run the same command again; or start from the beginning "
            "in another --workdir."
        )


def _number(path: Path) -> int:
    return int(path.name)
