"""Images in folders: `PATH/split/class/image`, or `PATH/class/image`, which is divided.

Classes are the names of the folders, in their order; an image's id is its path below PATH. What is
listed once is what a run trains on: files that come later do not, and a run goes on only with the
same listing.
"""

import concurrent.futures
import errno
import logging
import os
from collections.abc import Iterator

from vitcls import images
from vitcls.data.files_split import NUM_THREADS, FilesSplit, divide, show
from vitcls.data.split import Split
from vitcls.errors import StorageError, UserError, unknown

log = logging.getLogger("vitcls")

# A folder is divided into splits by its own folders if one of them has such a name and folders in
# it; a class called "train" has images.
SPLIT_NAMES = (
    "train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "holdout",
)  # fmt: skip


class FolderSplit(FilesSplit):
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
        root = os.path.abspath(os.path.expanduser(root))
        folder = os.path.join(root, split) if split else root
        class_names = _class_folders(folder)
        prefixes = [os.path.join(split, name) for name in class_names]
        with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
            listings = list(pool.map(lambda prefix: _list_images(root, prefix), prefixes))
        _check_classes(folder, dict(zip(class_names, listings, strict=True)))
        super().__init__(root, split or "all", class_names=class_names, listings=listings)


def open_folder(root: str, split: str) -> Split:
    """Opens a split of a folder of images.

    With split folders, they are the splits. Without, there are `train` and `test`: of every class
    a fifth, always the same, is the test split.

    Raises:
      UserError: What `FolderSplit` raises, or there is no such split.
    """
    path, names, has_splits = _look_into(root)
    if has_splits:
        if split not in names:
            raise _unknown_split(path, split, names)
        return FolderSplit(path, split)
    if split not in ("train", "test"):
        raise UserError(
            f"{path} has no split folders, and so is divided into 'train' and 'test'; there is no "
            f"{split!r}. Images for it belong into {os.path.join(path, 'SPLIT', 'CLASS')}."
        )
    return divide(FolderSplit(path), split)


def folder_split_names(root: str) -> list[str]:
    """Names of the splits that `open_folder` opens."""
    _, names, has_splits = _look_into(root)
    return names if has_splits else ["train", "test"]


def _look_into(root: str) -> tuple[str, list[str], bool]:
    """The full path, its folders, and whether they are splits."""
    if not root:
        raise UserError("data.source='folder:' names no folder; folder:PATH, for example.")
    path = os.path.abspath(os.path.expanduser(root))
    names = _subfolders(path)
    split_folders = [name for name in names if name in SPLIT_NAMES]
    if any(_subfolders(os.path.join(path, name)) for name in split_folders):
        return path, names, True
    if split_folders and split_folders == names:  # nobody's classes
        raise UserError(
            f"{path} has the splits {show(names)} without classes; put their images into one "
            "folder per class."
        )
    return path, names, False


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
            f"{folder}: no images in {len(empty)} of {len(listings)} classes: {show(empty)}. "
            "Put images there, or remove the folder."
        )
    if len(listings) < 2:
        raise UserError(
            f"{folder} has one class only, {next(iter(listings))!r}; there must be two or more, "
            "each in a folder of its own."
        )


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
