"""Images in folders: `PATH/split/class/image`, or `PATH/class/image`, which is divided.

Classes are the names of the folders: in the order of their numbers if all are whole numbers,
otherwise as text. An image's id is its path below PATH. A run trains on the files listed at its
start, without later ones, and continues only with the same listing.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Sequence

from vitcls.data.sources import classes, image_files, split_roles
from vitcls.data.sources.files import NUM_THREADS, FilesSplit, divide, show
from vitcls.data.sources.image_files import subfolders
from vitcls.data.sources.split import Split
from vitcls.errors import UserError

# Splits that may lack a class: nothing is learned from them.
_MEASURING = ("validation", "test", "holdout")


class FolderSplit(FilesSplit):
    """The images below one folder per class."""

    def __init__(
        self,
        root: str,
        folder: str = "",
        *,
        name: str = "",
        order: Callable[[list[str]], list[str]] = classes.ordered,
    ):
        """Lists `root/folder/class/...`; nested folders inside a class belong to it.

        Hidden files, and files that are not images, are left out. Symbolic links are followed.

        Args:
          root: The folder that ids are relative to.
          folder: The split's folder; "": `root` has the class folders.
          name: The split's name; "": that of its folder.
          order: Sorts the class names.

        Raises:
          UserError: No such folder, no classes or only one, a class without images, or a folder
            that cannot be listed. A split that only measures may lack images of some classes.
        """
        root = os.path.abspath(os.path.expanduser(root))
        path = os.path.join(root, folder) if folder else root
        # Archives often hold a folder of the split's name once more.
        while folder and subfolders(path) == [os.path.basename(path)]:
            folder = os.path.join(folder, os.path.basename(path))
            path = os.path.join(root, folder)
        class_names = order(_class_folders(path))
        prefixes = [os.path.join(folder, name) for name in class_names]
        with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
            listings = list(
                pool.map(lambda prefix: image_files.list_images(root, prefix), prefixes)
            )
        found = {name: one.images for name, one in zip(class_names, listings, strict=True)}
        is_measured = split_roles.role_of(os.path.basename(folder)) in _MEASURING
        _check_classes(path, found, is_strict=not is_measured)
        _check_nested(path, folder, found)
        found = {name: images for name, images in found.items() if images}
        super().__init__(
            root, name or folder or "all", class_names=[*found], listings=[*found.values()]
        )
        self.found = _describe(path, class_names, listings)


def open_folder(
    root: str, split: str, *, order: Callable[[list[str]], list[str]] = classes.ordered
) -> Split:
    """Opens a split of a folder of images.

    Split folders are the splits. Without them, there are `train` and `test`: the test split is a
    fifth of every class, always the same.

    Raises:
      UserError: What `FolderSplit` raises, or an unknown split.
    """
    path, names = _look_into(root)
    if names:
        folder = _find_split(path, split, names)
        opened = FolderSplit(path, folder, name=split, order=order)
        opened.found = f"Splits: {', '.join(split_roles.offered(names))}. {opened.found}"
        if others := [name for name in subfolders(path) if name not in names]:
            opened.found += f" Not used: {show(others)}, without classes."
        return opened
    if split not in ("train", "test"):
        raise UserError(
            f"{path} has no split folders, and so is divided into 'train' and 'test'; there is no "
            f"{split!r}. Put images for it into {os.path.join(path, 'SPLIT', 'CLASS')}."
        )
    whole = FolderSplit(path, order=order)
    part = divide(whole, split)
    part.found = f"No split folders: a fifth of every class is 'test'. {whole.found}"
    return part


def folder_split_names(root: str) -> list[str]:
    """Names of the splits that `open_folder` opens."""
    _, names = _look_into(root)
    return list(split_roles.offered(names)) if names else ["train", "test"]


def _look_into(root: str) -> tuple[str, list[str]]:
    """The full path and its split folders; none if the folders are classes.

    Raises:
      UserError: They look like splits, but cannot be used as such.
    """
    if not root:
        raise UserError("data.source='folder:' names no folder; folder:PATH, for example.")
    path = os.path.abspath(os.path.expanduser(root))
    try:
        names = subfolders(path)
    except UserError as error:
        raise UserError(f"data.source: {error}") from error
    roles = split_roles.find_roles(names)
    if any(subfolders(os.path.join(path, name)) for name in roles):
        return path, _check_others(path, names, roles)
    if len(set(roles.values())) > 1 or (roles and len(roles) == len(names)):
        raise UserError(
            f"{path} has the splits {show(list(roles))} without classes; put their images into one "
            "folder per class."
        )
    suspects = split_roles.find_suspects(names)
    if suspects and (len(suspects) > 1 or len(suspects) == len(names)):
        raise UserError(
            f"{path}: {show(suspects)} look like splits, but it is not clear which is which. Name "
            "them 'train', 'val' and 'test', with one folder per class in each; or, if they are "
            "classes, rename them."
        )
    return path, []


def _check_others(path: str, names: list[str], roles: dict[str, str]) -> list[str]:
    """The split folders, at least one of which is recognised by its name.

    Others count as splits if they have folders.
    """
    others = [name for name in names if name not in roles]
    flat = [name for name in others if not subfolders(os.path.join(path, name))]
    with_images = [
        name for name in flat if image_files.list_images(path, name, is_strict=False).images
    ]
    if with_images and len(set(roles.values())) == 1:
        raise UserError(
            f"{path}: {show(list(roles))} has folders and looks like a split, but "
            f"{show(with_images)} have images and look like classes. Put all images into "
            "SPLIT/CLASS, or all into CLASS."
        )
    return [name for name in names if name not in flat]


def _find_split(path: str, split: str, names: list[str]) -> str:
    try:
        return split_roles.find(f"split of {path}", split, names)
    except UserError as error:
        validation = [name for name in names if split_roles.role_of(name) == "validation"]
        if split != "test":
            raise
        if validation:
            raise UserError(
                f"{error} To measure on {validation[0]!r}, set "
                f'data.eval_splits="({validation[0]!r},)", or --split={validation[0]} in '
                "evaluation."
            ) from error
        raise UserError(
            f"{error} folder:{os.path.join(path, names[0])} is divided into both."
        ) from error


def _class_folders(folder: str) -> list[str]:
    """Names of the folders in `folder`."""
    names = subfolders(folder)
    if not names:
        raise UserError(
            f"{folder} has {len(_loose_images(folder)) or 'no'} images and no folders; put the "
            "images into one folder per class."
        )
    return names


def _loose_images(folder: str) -> list[str]:
    return [
        entry.name
        for entry in image_files.scan(folder)
        if not image_files.is_dir(entry) and not image_files.why_unused(entry.path)
    ]


def _check_classes(folder: str, found: dict[str, list], *, is_strict: bool) -> None:
    empty = [name for name, images in found.items() if not images]
    if len(empty) == len(found) or (empty and is_strict):
        raise UserError(
            f"{folder}: no images in {len(empty)} of {len(found)} classes: {show(empty)}. "
            "Put images there, or remove the folder."
        )
    if len(found) < 2 and is_strict:
        name = next(iter(found))
        inside = subfolders(os.path.join(folder, name))
        hint = f" {name} has folders itself: try folder:{os.path.join(folder, name)}."
        raise UserError(
            f"{folder} has one class only, {name!r}; there must be two or more, "
            f"each in a folder of its own.{hint if len(inside) > 1 else ''}"
        )


def _check_nested(path: str, folder: str, found: dict[str, list]) -> None:
    """Raises `UserError` if classes contain splits instead of splits classes."""
    depth = len(folder.split(os.sep)) + 1 if folder else 1
    inside = {
        parts[depth]
        for images in found.values()
        for parts in (image.split(os.sep) for image, _ in images)
        if len(parts) > depth + 1
    }
    roles = split_roles.find_roles(inside)
    if len(set(roles.values())) > 1:
        raise UserError(
            f"{path}: the classes are divided into {show(sorted(roles))}. Put the images into "
            "SPLIT/CLASS instead of CLASS/SPLIT; as they are, all would be mixed."
        )


def _describe(
    path: str, class_names: Sequence[str], listings: Sequence[image_files.Listing]
) -> str:
    """Used and unused files of a split's folder, in one line."""
    num_images = sum(len(one.images) for one in listings)
    empty = [name for name, one in zip(class_names, listings, strict=True) if not one.images]
    num_classes = len(class_names) - len(empty)
    text = f"{num_images} images of {num_classes} classes in {path}."
    by_reason: dict[str, list[str]] = {}
    unused = collections.Counter()
    for name, one in zip(class_names, listings, strict=True):
        unused += one.unused
        for reason in one.unused:
            by_reason.setdefault(reason, []).append(name)
    lines = [
        f"{image_files.describe_unused({reason: number})} in {show(by_reason[reason])}"
        for reason, number in unused.most_common()
    ]
    if loose := _loose_images(path):
        lines.insert(0, f"{len(loose)} images directly in {path}, in no class")
    if empty:
        lines.append(f"{show(empty)}, without images")
    return text + (f" Not used: {'; '.join(lines)}." if lines else "")
