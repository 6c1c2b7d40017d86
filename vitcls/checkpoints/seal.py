"""The seal of a folder: a digest of each of its files, so that a flipped bit does not go unseen."""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

from vitcls.files import written_aside
from vitcls.logs.progress import doing

NAME = "sha256.json"
# Orbax writes the last two after the seal, and reads a checkpoint without them.
_UNSEALED = {NAME, f"{NAME}.tmp", "_CHECKPOINT_METADATA", "commit_success.txt"}


def write(folder: Path) -> None:
    """Writes the seal of the files in `folder`, or a new one, once they are on the disk."""
    digests = _digests(sorted(_files(folder)), folder, sync=True)
    with written_aside(folder / NAME) as aside:
        aside.write_text(json.dumps(digests, indent=0))


def damage(folder: Path, *, part: str = "") -> str | None:
    """Returns the first difference between the files and their seal, or None.

    Args:
      folder: The sealed folder.
      part: Start of the names, relative to `folder`, that are checked; "": all.
    """
    try:
        sealed = json.loads((folder / NAME).read_bytes())
        paths = [folder / name for name in sealed if name.startswith(part)]
        digests = _digests([path for path in paths if path.is_file()], folder)
    except FileNotFoundError:
        return f"{NAME} is missing"
    # The seal itself may be damaged: not JSON, or not an object.
    except (OSError, ValueError, AttributeError) as error:
        return f"{NAME} or what it lists cannot be read ({error})"
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if name not in digests:
            return f"{name} is missing"
        if digests[name] != sealed[name]:
            return f"{name} is not what was written"
    return None


def _files(folder: Path) -> list[Path]:
    unsealed = {folder / name for name in _UNSEALED}
    return [path for path in folder.rglob("*") if path.is_file() and path not in unsealed]


def _digests(paths: list[Path], folder: Path, *, sync: bool = False) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            # Hashing a file this way lets other threads run.
            return hashlib.file_digest(file, "sha256").hexdigest()

    with doing(f"Hashing {folder}"), concurrent.futures.ThreadPoolExecutor(4) as pool:
        names = [path.relative_to(folder).as_posix() for path in paths]
        return dict(zip(names, pool.map(digest, paths), strict=True))
