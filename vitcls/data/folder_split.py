"""Images in folders: `PATH/split/class/image`, or `PATH/class/image`, which is divided.

Classes are the names of the folders, in their order; an image's id is its path below PATH. What is
listed once is what a run trains on: files that come later do not, and a run goes on only with the
same listing.
"""

import concurrent.futures
import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vitcls import images
from vitcls.data.split import Split, Subset, hold_out
from vitcls.errors import StorageError, UserError, unknown

log = logging.getLogger("vitcls")

# A folder is divided into splits by its own folders if one of them has such a name and folders in
# it; a class called "train" has images.
SPLIT_NAMES = (
    "train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "holdout",
)  # fmt: skip
# Of PATH/class/image, and the same in every run, whatever its seed: results stay comparable. The
# seed is beyond all that train.seed can be, so that hold-outs are drawn independently.
TEST_FRACTION = 0.2
_DIVISION_SEED = 2**32

# Listing waits for the disk or the network: more threads than processors.
_NUM_THREADS = 16
_MOST_SHOWN = 5  # names in a message


class FolderSplit(Split):
    """The images below one folder per class."""

    def __init__(self, root: str, split: str = ""):
        """Lists `root/split/class/...`; nested folders inside a class belong to it.

        Hidden files, and files without an extension of an image format, are left out. Symbolic
        links are followed.

        Args:
          root: The folder that ids are relative to.
          split: The split's folder; "": `root` has the class folders.

        Raises:
          UserError: No such folder, no classes or only one, a class without images, or what
            cannot be listed.
        """
        self.name = split or "all"
        self._root = os.path.abspath(os.path.expanduser(root))
        folder = os.path.join(self._root, split) if split else self._root
        self.class_names = tuple(_class_folders(folder))
        prefixes = [os.path.join(split, name) for name in self.class_names]
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            listings = list(pool.map(lambda prefix: _list_images(self._root, prefix), prefixes))
        _check_classes(folder, dict(zip(self.class_names, listings, strict=True)))
        # One string for all paths: a million of them reach a worker process as one object.
        paths = [os.fsencode(path) for listing in listings for path, _ in listing]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths])
        counts = [len(listing) for listing in listings]
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        sizes = np.array([size for listing in listings for _, size in listing], "<i8")
        self.fingerprint = _fingerprint(self.class_names, paths, sizes)

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example.

        Raises:
          UserError: The file may not be read.
          StorageError: It is gone, or the disk fails.
        """
        path = os.path.join(self._root, self.id(index))
        try:
            with open(path, "rb") as file:
                return file.read(), int(self._labels[index])
        except PermissionError as error:
            raise UserError(f"No permission to read {path}.") from error
        except OSError as error:
            raise StorageError(
                f"Cannot read {path}, which was there at the start: {error.strerror}."
            ) from error

    def id(self, index: int) -> str:
        """The path relative to the root."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._paths[start : self._ends[index]])

    def labels(self) -> np.ndarray:
        """All labels, int32 (N,), without reading an image."""
        return self._labels

    def origin(self) -> dict[str, Any]:
        """The listing's hash, which covers class names, paths and sizes of files."""
        return {"listing_sha256": self.fingerprint}


class DividedSplit(Subset):
    """The "train" or the "test" part of a folder that has no split folders."""

    def origin(self) -> dict[str, Any]:
        """As for the whole folder, and how it was divided."""
        fractions = {"train": 1 - TEST_FRACTION, "test": TEST_FRACTION}
        return super().origin() | {"divided": {"fractions": fractions, "seed": _DIVISION_SEED}}


def open_folder(root: str, split: str) -> Split:
    """Opens a split of a folder of images.

    With split folders, they are the splits. Without, there are `train` and `test`: of every class
    a fifth, always the same, is the test split.

    Raises:
      UserError: What `FolderSplit` raises, or there is no such split.
    """
    if not root:
        raise UserError("data.source='folder:' names no folder; folder:PATH, for example.")
    path = os.path.abspath(os.path.expanduser(root))
    names = _subfolders(path)
    split_folders = [name for name in names if name in SPLIT_NAMES]
    if any(_subfolders(os.path.join(path, name)) for name in split_folders):
        if split not in names:
            raise _unknown_split(path, split, names)
        return FolderSplit(path, split)
    if split_folders and split_folders == names:  # nobody's classes
        raise UserError(
            f"{path} has the splits {_show(names)} without classes; put their images into one "
            "folder per class."
        )
    if split not in ("train", "test"):
        raise UserError(
            f"{path} has no split folders, and so is divided into 'train' and 'test'; there is no "
            f"{split!r}. Images for it belong into {os.path.join(path, 'SPLIT', 'CLASS')}."
        )
    return _divide(FolderSplit(path), split)


def _divide(whole: FolderSplit, split: str) -> DividedSplit:
    counts = np.bincount(whole.labels())
    if counts.min() < 2:
        raise UserError(
            f"{whole.class_names[counts.argmin()]!r} has one image only; a folder without split "
            "folders is divided into train and test, which needs two images or more of each class."
        )
    parts = dict(
        zip(("train", "test"), hold_out(whole, TEST_FRACTION, seed=_DIVISION_SEED), strict=True)
    )
    return DividedSplit(split, whole, indices=parts[split].indices)


def _unknown_split(path: str, split: str, names: list[str]) -> UserError:
    error = unknown(f"split of {path}", split, names)
    validation = [name for name in names if name in ("val", "valid", "validation")]
    if split != "test":
        return error
    if validation:
        return UserError(
            f"{error} To measure on {validation[0]!r}, set "
            f'data.eval_splits="({validation[0]!r},)", or --split={validation[0]} in evaluation.'
        )
    return UserError(f"{error} folder:{os.path.join(path, names[0])} is divided into both.")


def _class_folders(folder: str) -> list[str]:
    """Names of the folders in `folder`; images beside them are mentioned in the log."""
    names = _subfolders(folder)
    num_beside = sum(
        not _is_dir(entry) and images.has_image_suffix(entry.name) for entry in _scan(folder)
    )
    if not names:
        raise UserError(
            f"{folder} has {num_beside or 'no'} images and no folders; put the images into one "
            "folder per class."
        )
    if num_beside:
        log.warning("%d images directly in %s are in no class: not used.", num_beside, folder)
    return names


def _check_classes(folder: str, listings: dict[str, list]) -> None:
    empty = [name for name, listing in listings.items() if not listing]
    if empty:
        raise UserError(
            f"{folder}: no images in {len(empty)} of {len(listings)} classes: {_show(empty)}. "
            "Put images there, or remove the folder."
        )
    if len(listings) < 2:
        raise UserError(
            f"{folder} has one class only, {next(iter(listings))!r}; there must be two or more, "
            "each in a folder of its own."
        )


def _show(names: list[str]) -> str:
    return ", ".join(names[:_MOST_SHOWN]) + (", ..." if len(names) > _MOST_SHOWN else "")


def _fingerprint(class_names: tuple[str, ...], paths: list[bytes], sizes: np.ndarray) -> str:
    """Hash of class names, relative paths and sizes; contents would have to be read."""
    digest = hashlib.sha256()
    for part in (*map(os.fsencode, class_names), b"", *paths):
        digest.update(part + b"\0")  # no file name holds a zero: nothing else hashes the same
    digest.update(sizes.tobytes())
    return digest.hexdigest()


def _list_images(root: str, prefix: str) -> list[tuple[str, int]]:
    """Relative path and size of every image below `root/prefix`, sorted by path."""
    found = []
    pending = [(prefix, ())]
    while pending:
        folder, parents = pending.pop()
        path = os.path.join(root, folder)
        # A link to a folder above would be followed for ever.
        status = _stat(path)
        own = (status.st_dev, status.st_ino)
        if own in parents:
            raise UserError(f"{path} is a symbolic link to a folder that it is in; remove it.")
        for entry in _scan(path):
            name = os.path.join(folder, entry.name)
            if _is_dir(entry):
                pending.append((name, (*parents, own)))
            elif images.has_image_suffix(entry.name):
                found.append((name, _stat(entry).st_size))
    return sorted(found)


def _subfolders(path: str) -> list[str]:
    return sorted(entry.name for entry in _scan(path) if _is_dir(entry))


def _scan(path: str) -> Iterator[os.DirEntry]:
    """Entries that are not hidden, as the system lists them."""
    try:
        with os.scandir(path) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise _unusable(path, error) from error


def _stat(path: str | os.DirEntry) -> os.stat_result:
    try:
        return path.stat() if isinstance(path, os.DirEntry) else os.stat(path)
    except OSError as error:
        raise _unusable(os.fspath(path), error) from error


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise _unusable(entry.path, error) from error


def _unusable(path: str, error: OSError) -> Exception:
    is_link = os.path.islink(path)
    reasons = {
        errno.ENOENT: "is a broken symbolic link; remove it" if is_link else "does not exist",
        errno.ELOOP: "is a symbolic link to itself; remove it",
        errno.ENOTDIR: "is a file, not a folder",
        errno.EACCES: "cannot be listed: no permission",
    }
    if error.errno not in reasons:
        return StorageError(f"Cannot list {path}: {error.strerror}.")
    return UserError(f"data.source: {path} {reasons[error.errno]}.")
