"""The images that a run has seen, kept in its workdir as hashes of their ids: `seen.npz`.

For any split of the same data they tell later how many of its images were trained on. This works
after files have been added, and after the data have been moved.

N images.
"""

import dataclasses
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vitcls.data import sources
from vitcls.data.sources.split import Split, hash_ids
from vitcls.errors import StorageError, UserError
from vitcls.files import written_aside
from vitcls.folders.workdir import Workdir
from vitcls.pretrained.run import find_run
from vitcls.provenance import records
from vitcls.provenance.saved_config import read_saved_config
from vitcls.run.splits import open_splits

log = logging.getLogger("vitcls")

# Name of an array in the file. Those of the evaluated splits are evaluated/NAME.
_TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run has seen.

    Attributes:
      home: Place in which its ids are unique, see `sources.home`.
      train: `Split.hashes` of the images that were trained on.
      evaluated: The same for each split that was evaluated.
      division: How the run's data are divided, see `vitcls.data.sources.division`.
    """

    home: str
    train: np.ndarray
    evaluated: dict[str, np.ndarray]
    division: str = "hash"

    def num_trained_on(self, split: Split, source: str) -> int:
        """Returns how many images of a source's split were trained on."""
        return int(np.isin(self._hashes(split, source), self.train).sum())

    def num_evaluated(self, split: Split, source: str, name: str) -> int:
        """Returns how many images of a source's split the run evaluated under this name."""
        known = self.evaluated.get(name, np.zeros(0, np.uint64))
        return int(np.isin(self._hashes(split, source), known).sum())

    def num_new(self, split: Split, source: str) -> int:
        """Returns how many images of a source's split the run has not seen at all."""
        known = np.concatenate([self.train, *self.evaluated.values()])
        return int((~np.isin(self._hashes(split, source), known)).sum())

    def _hashes(self, split: Split, source: str) -> np.ndarray:
        """The split's hashes, of ids as the run had them."""
        home = sources.home(source)
        if home == self.home:
            return split.hashes()
        # The source names the same files relative to a folder above or below.
        start = os.path.join(self.home, "")
        paths = (os.path.normpath(os.path.join(home, split.id(i))) for i in range(len(split)))
        return hash_ids(path.removeprefix(start) for path in paths)


def write(workdir: Workdir, config: ConfigDict, train: Split, evaluated: dict[str, Split]) -> None:
    """Writes what a run with this config sees."""
    arrays = {f"evaluated/{name}": split.hashes() for name, split in evaluated.items()}
    arrays[_TRAIN] = train.hashes()
    home, division = sources.home(config.data.source), config.data.division
    with written_aside(workdir.seen) as aside, aside.open("wb") as file:
        np.savez(file, home=home, division=division, **arrays)


def find(checkpoint: str | Path, source: str, *, data_dir: str | None = None) -> Seen | None:
    """Finds the images of a source that the run of a checkpoint has seen.

    If the run left no list, its data are opened again.

    Args:
      checkpoint: As `pretrained.load` takes it.
      source: The data set whose images are asked about.
      data_dir: Folder of all tfds data.

    Returns:
      None if they are not known. Then the checkpoint does not belong to a run, the source is not
      the run's, or the run left no list and its data have changed.
    """
    run = find_run(checkpoint)
    if run is None:
        return None
    workdir = Workdir(run.directory)
    known = _read(workdir.seen)
    if known is not None and _is_within(known.home, sources.home(source)):
        return known
    # Weights can be evaluated without the config.
    try:
        config = read_saved_config(workdir.config)
    except UserError:
        return None
    config.data.update(cache="", data_dir=data_dir or config.data.data_dir)
    own = config.data.source
    # The source may be the run's data in another place; ids are relative to it.
    for place in dict.fromkeys([source, *([own] if known is None else [])]):
        if place == own and not _is_within(sources.home(own), sources.home(source)):
            continue
        config.data.source = place
        try:
            train, evaluated = open_splits(config, is_continued=True)
        except (UserError, StorageError):
            continue
        if records.recorded_fingerprints(workdir.path).get(train.name) == train.fingerprint:
            evaluated = {name: split.hashes() for name, split in evaluated.items()}
            return Seen(sources.home(place), train.hashes(), evaluated, config.data.division)
    if _is_within(sources.home(own), sources.home(source)):
        log.warning(
            "%s has no %s, and its data have changed: it is not known which of these images it "
            "was trained on.", run.directory, workdir.seen.name,
        )  # fmt: skip
    return None


def open_split(
    checkpoint: str, source: str, name: str, *, data_dir: str | None = None
) -> tuple[Split, Seen | None]:
    """Opens a split, divided as for a checkpoint's run; also returns what that run has seen."""
    seen = find(checkpoint, source, data_dir=data_dir)
    division = seen.division if seen is not None else "hash"
    return sources.open_split(source, name, data_dir=data_dir, division=division), seen


def count_and_warn(seen: Seen | None, split: Split, source: str) -> int | None:
    """Returns how many images of a split a checkpoint was trained on; None: it is not known.

    Warns of them, and of images that were added to the data later.
    """
    if seen is None:
        return None
    if trained_on := seen.num_trained_on(split, source):
        log.warning(
            "The checkpoint was trained on %d of the %d images of %r: they do not show how good it "
            "is with new images.", trained_on, len(split), split.name,
        )  # fmt: skip
    num_new = seen.num_new(split, source)
    if split.name in seen.evaluated and 0 < num_new < len(split):
        log.warning(
            "%r has changed since the run of this checkpoint: %d of its %d images are new, and "
            "were %d then.", split.name, num_new, len(split), len(seen.evaluated[split.name]),
        )  # fmt: skip
    return trained_on


def _read(path: Path) -> Seen | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        home, division = str(arrays.pop("home")), str(arrays.pop("division"))
        train = arrays.pop(_TRAIN)
    # The file is missing or damaged.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    evaluated = {name.removeprefix("evaluated/"): array for name, array in arrays.items()}
    return Seen(home, train, evaluated, division)


def _is_within(one: str, other: str) -> bool:
    """Whether the homes are one, or one folder is in the other."""
    return one == other or (
        os.path.isabs(one)
        and os.path.isabs(other)
        and os.path.commonpath([one, other]) in (one, other)
    )
