"""Prepares tfds data sets once, in a process of their own.

Preparing needs TensorFlow, which is optional; reading prepared data does not. By hand:
`python -m vitcls.data.sources.prepare SOURCE [--data_dir=DIR]`. Data sets with records elsewhere
are downloaded and rewritten as ArrayRecord files, the format with random access.
"""

import argparse
import importlib.util
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import TextIO

import tensorflow_datasets as tfds

from vitcls.data.sources import builders
from vitcls.errors import STORAGE_ERRNOS, StorageError, UserError
from vitcls.files import sync
from vitcls.folders import lock, user_folders
from vitcls.logs.progress import doing

_FORMAT = "array_record"
_TAIL = 2000  # characters of a failed preparation's output that its error shows


def prepare_once(source: str, *, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """Prepares a data set unless it is prepared; of several processes, only one does.

    Args:
      source: `digits`, `glyphs` or `tfds:NAME[/CONFIG][:VERSION]`.
      data_dir: Folder of all tfds data; None: tfds' own default.

    Returns:
      The builder of the data on disk.

    Raises:
      UserError: No such data set, or it cannot be prepared, as without TensorFlow.
      StorageError: The folder cannot be written, or is full.
    """
    builder = builders.find_builder(source, data_dir=data_dir)
    folder = pathlib.Path(builder.data_path)
    if not builders.is_prepared(builder):
        _check_can_prepare(source)
        try:
            with lock.waiting(folder.parent / f".{folder.name}.lock") as (file, is_alone):
                if not builders.is_prepared(builder):  # by the process that held the lock
                    try:
                        _run(source, data_dir, file)
                    except (UserError, StorageError):
                        if is_alone or not builders.is_prepared(builder):  # by another process
                            raise
        except BrokenPipeError:  # from writing our own messages
            raise
        except OSError as error:
            raise StorageError(f"Cannot prepare {source} in {folder}: {error}") from error
    with builders.reading_prepared(source):
        return tfds.builder_from_directory(folder)


def _check_can_prepare(source: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{source} is not prepared yet, and preparing it needs the package `tensorflow`, which "
            "is optional: pip install -r requirements-tfds.txt. Or copy the prepared data from "
            "another machine: reading them needs no TensorFlow."
        )


def _run(source: str, data_dir: str | None, lock: TextIO) -> None:
    """Runs this module's `main` in a process of its own, which also holds the lock."""
    command = [sys.executable, "-m", "vitcls.data.sources.prepare", source]
    if data_dir is not None:
        command.append(f"--data_dir={data_dir}")
    # Importable however this process found the package; quiet, and without the accelerator.
    package = str(pathlib.Path(__file__).parents[3])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",  # announces itself at any log level
        "CUDA_VISIBLE_DEVICES": "",
    }
    if user_folders.home() is None:  # TensorFlow would make a folder that is called ~
        environment["KERAS_HOME"] = os.path.join(tempfile.gettempdir(), "keras")
    print(f"Preparing {source}: once, in a separate process.", flush=True)
    # Progress bars go to the terminal; only standard output, which explains a failure, is kept. The
    # process may outlive this one: with the open lock file it inherits the lock.
    with doing(f"Preparing {source}"):
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            check=False,
            pass_fds=[lock.fileno()],
        )
    if done.returncode == 0:
        return
    error = StorageError if done.returncode == StorageError.exit_code else UserError
    raise error(
        f"Preparing {source} failed (exit code {done.returncode}); to try it by hand: "
        f"{shlex.join(['python', *command[1:]])}\n{done.stdout[-_TAIL:].strip()}"
    )


def prepare(source: str, *, data_dir: str | None = None) -> None:
    """Downloads and writes a data set, in this process. Imports TensorFlow."""
    builder = builders.find_builder(source, data_dir=data_dir)
    if builders.is_prepared(builder):
        return
    _check_can_prepare(source)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # Copies on Google's storage have no random access, and asking for them costs seconds offline.
    download = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(file_format=_FORMAT, download_config=download)
    folder = pathlib.Path(builder.data_path)
    for path in [*folder.rglob("*"), folder, folder.parent]:
        sync(path)


def main() -> int:
    """Prepares the data set named on the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vitcls.data.sources.prepare")
    parser.add_argument("source", help="digits, glyphs or tfds:NAME[/CONFIG][:VERSION]")
    parser.add_argument("--data_dir", help="folder of all tfds data; default: tfds' own")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # errors may hold names of any kind
    try:
        prepare(arguments.source, data_dir=arguments.data_dir)
    # Failed and manual downloads raise types of many libraries; their text is what helps.
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        # Failed downloads are also `OSError`s, but without such a number.
        is_storage = getattr(error, "errno", None) in STORAGE_ERRNOS
        return StorageError.exit_code if is_storage else UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
