"""Lists the image files below a folder, and counts the other ones.

All commands list folders here, so they use the same files. The suffix decides what is an image; if
it is missing or unknown, the first bytes of the file do.
"""

import collections
import errno
import fnmatch
import functools
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from PIL import Image

from vitcls.data import images
from vitcls.errors import StorageError, UserError

# Suffixes of files that are not images; such files are not opened. Raw files of cameras look like
# TIFF, but Pillow would read their thumbnails.
OTHER_SUFFIXES = frozenset(
    (
        ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".yaml", ".yml", ".py",
        ".pdf", ".svg", ".db", ".ini", ".log", ".npy", ".npz", ".pkl", ".pt", ".pth", ".mat",
        ".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".mp4", ".avi", ".mov", ".mkv", ".webm",
        ".mp3", ".wav", ".nef", ".cr2", ".cr3", ".dng", ".arw", ".orf", ".rw2", ".raf", ".pef",
        ".srw",
    )
)  # fmt: skip
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
# Folders that systems and archives leave next to images.
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__pycache__")
)

_NUM_FIRST_BYTES = 32
# JPEG, PNG, GIF, BMP, WebP, TIFF, JPEG 2000, AVIF.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0\0\0\0|RIFF.{4}WEBP|II\*\0|MM\0\*"
    rb"|\0\0\0\x0cjP  |.{4}ftypavi[fs]",
    re.DOTALL,
)


class Listing(NamedTuple):
    """Files below a folder.

    Attributes:
      images: Path relative to the root and size in bytes of every image, sorted by path.
      unused: Number of other files by the reason why they are not images.
    """

    images: list[tuple[str, int]]
    unused: collections.Counter[str]


def suffixes() -> list[str]:
    """Suffixes of files that count as images without being opened."""
    registered = Image.registered_extensions().items()
    return sorted(
        suffix
        for suffix, kind in registered
        if (kind in Image.OPEN or kind == "MPO") and kind not in images.WITHOUT_PIXELS
    )


def why_unused(path: str) -> str:
    """Why a file is not an image, as text after a number of files; "": it is one.

    Raises:
      UserError: The file may not be read.
      StorageError: The disk fails.
    """
    suffix = os.path.splitext(path)[1]
    lower = suffix.lower()
    if lower in _image_suffixes():
        return ""
    if lower in HEIF_SUFFIXES:
        return f"{suffix} (to read them: {images.HEIF_ADVICE})"
    if lower in OTHER_SUFFIXES or lower in Image.registered_extensions():
        return f"{suffix} (not images)"
    try:
        with open(path, "rb") as file:
            first_bytes = file.read(_NUM_FIRST_BYTES)
    except OSError as error:
        raise unusable(path, error) from error
    if _MAGIC.match(first_bytes):
        return ""
    named = suffix or "without suffix"
    if images.is_heif(first_bytes):
        return "" if images.HAS_HEIF else f"{named} (to read them: {images.HEIF_ADVICE})"
    return f"{named} (not images by their content)"


@functools.cache
def _image_suffixes() -> frozenset[str]:
    return frozenset(suffixes())


def list_images(root: str, folder: str = "", *, is_strict: bool = True) -> Listing:
    """Lists the images in `root/folder` and in all folders below it. Links are followed.

    Hidden files and folders are left out, and `SYSTEM_FOLDERS`.

    Args:
      root: What paths are relative to.
      folder: Relative to the root; "": the root itself.
      is_strict: Whether a broken link, and a link to a folder that it is in, is an error. Otherwise
        the first is listed as an image of size 0, and the second is not followed but counted.

    Raises:
      UserError: A folder may not be listed, or a link is an error.
      StorageError: The disk fails.
    """
    found, unused = [], collections.Counter()
    pending = [(folder, ())]
    while pending:
        folder, parents = pending.pop()
        path = os.path.join(root, folder) if folder else root
        status = _stat(path)
        own = (status.st_dev, status.st_ino)
        # A link to a folder above would be followed for ever, and that folder is listed anyway.
        if own in parents or (parents and _leads_up(path)):
            if is_strict:
                raise UserError(f"{path} is a symbolic link to a folder that it is in; remove it.")
            unused["links to a folder that they are in"] += 1
            continue
        for entry in scan(path):
            name = os.path.join(folder, entry.name)
            if is_dir(entry):
                if entry.name not in SYSTEM_FOLDERS:
                    pending.append((name, (*parents, own)))
            elif not is_strict and not os.path.exists(entry.path):
                found.append((name, 0))
            elif not stat.S_ISREG((status := _stat(entry)).st_mode):
                unused["special files, such as pipes"] += 1
            elif reason := why_unused(entry.path):
                unused[reason] += 1
            else:
                found.append((name, status.st_size))
    return Listing(sorted(found), unused)


def match_pattern(pattern: str) -> list[str]:
    """Returns the files that a shell's pattern names, sorted; `**` stands for any folders.

    Hidden files are matched only by a pattern that begins with a dot.

    Raises: as `list_images` without `is_strict`.
    """
    parts = pattern.split(os.sep)
    start = os.sep if pattern.startswith(os.sep) else ""
    return sorted(set(_expand(start, [part for part in parts if part])))


def _expand(folder: str, parts: list[str]) -> Iterator[str]:
    """Files below `folder` that match a pattern's parts."""
    part, *rest = parts
    if part == "**":
        yield from _expand(folder, rest or ["*"])
        for entry in scan(folder or "."):
            if is_dir(entry) and not _leads_up(entry.path):
                yield from _expand(os.path.join(folder, entry.name), parts)
        return
    if any(sign in part for sign in "*?["):
        entries = scan(folder or ".", with_hidden=part.startswith("."))
        names = [entry.name for entry in entries if fnmatch.fnmatchcase(entry.name, part)]
    else:
        names = [part]
    for name in names:
        path = os.path.join(folder, name)
        if rest and os.path.isdir(path):
            yield from _expand(path, rest)
        elif not rest and os.path.lexists(path) and not os.path.isdir(path):
            yield path


def describe_unused(unused: Mapping[str, int]) -> str:
    """Returns "6 files .HEIC (...), 2 files .txt (...)"."""
    return ", ".join(
        f"{number} file{'s' * (number > 1)} {reason}" if reason[0] in ".w" else f"{number} {reason}"
        for reason, number in unused.items()
    )


def subfolders(path: str) -> list[str]:
    """Names of the folders in `path`, sorted, without hidden and system ones."""
    return sorted(
        entry.name for entry in scan(path) if entry.name not in SYSTEM_FOLDERS and is_dir(entry)
    )


def scan(path: str, *, with_hidden: bool = False) -> Iterator[os.DirEntry]:
    """Entries of a folder, as the system lists them."""
    try:
        with os.scandir(path) as entries:
            yield from (one for one in entries if with_hidden or not one.name.startswith("."))
    except OSError as error:
        raise unusable(path, error) from error


def is_dir(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError as error:
        raise unusable(entry.path, error) from error


def _leads_up(path: str) -> bool:
    """Whether a path is a link to a folder that it is in."""
    if not os.path.islink(path):
        return False
    target, place = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return os.path.commonpath([target, place]) == target


def _stat(path: str | os.DirEntry) -> os.stat_result:
    try:
        return path.stat() if isinstance(path, os.DirEntry) else os.stat(path)
    except OSError as error:
        raise unusable(os.fspath(path), error) from error


def unusable(path: str, error: OSError) -> Exception:
    """The error for a file or folder that the system refuses."""
    is_link = os.path.islink(path)
    reasons = {
        errno.ENOENT: "is a broken symbolic link; remove it" if is_link else "does not exist",
        errno.ELOOP: "is a symbolic link to itself; remove it",
        errno.ENOTDIR: "is a file, not a folder",
        errno.EACCES: "cannot be listed: no permission",
    }
    if error.errno not in reasons:
        return StorageError(f"Cannot list {path}: {error.strerror}.")
    return UserError(f"{path} {reasons[error.errno]}.")
