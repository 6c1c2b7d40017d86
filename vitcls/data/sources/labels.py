"""Labels of splits that store them inside their records, kept from one run to the next."""

import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from vitcls.files import sync
from vitcls.folders import user_folders


def cached_labels(fingerprint: str, read: Callable[[], Sequence[int]]) -> np.ndarray:
    """Labels kept under this fingerprint in the user's cache folder, else what `read` returns.

    The folder is `labels` in `user_folders.cache`, if there is one.

    Returns:
      int32 (N,).
    """
    cache = user_folders.cache()
    if cache is None:
        return np.asarray(read(), np.int32)
    path = cache / "labels" / f"{fingerprint}.npy"
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):  # none yet, or damaged
        labels = np.asarray(read(), np.int32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            np.save(pathlib.Path(folder) / path.name, labels)
            sync(pathlib.Path(folder) / path.name)
            os.replace(pathlib.Path(folder) / path.name, path)  # the whole file or nothing
    except OSError:
        pass  # without the cache the next run only reads the labels again
    return labels
