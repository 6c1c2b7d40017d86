"""The folders below a directory of checkpoints: one per step, and what failures leave beside them.

A step's folder has its number for a name. `STEP.orbax-checkpoint-tmp` is being written, what is in
`deleted` is being deleted, `STEP.corrupt-NUMBER` was found damaged.
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
    """Whether a checkpoint lies in `directory`, which need not exist, be it a damaged one."""
    return directory.is_dir() and any(
        path.name.isdigit() or DAMAGED in path.name for path in directory.iterdir()
    )


def clear_away(directory: Path) -> None:
    """Deletes what saves and deletions that did not come to their end have left."""
    for path in [*directory.glob(f"*{TEMPORARY}*"), directory / DELETED]:
        shutil.rmtree(path, ignore_errors=True)


def set_damaged_aside(directory: Path) -> None:
    """Renames the checkpoints that are not as they were sealed.

    Raises:
      StorageError: there are checkpoints, and all are damaged.
    """
    steps = sorted((path for path in directory.iterdir() if path.name.isdigit()), key=_number)
    damages = {path: seal.damage(path) for path in steps}
    for path, what in damages.items():
        if what is not None:
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
