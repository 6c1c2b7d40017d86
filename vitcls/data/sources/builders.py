"""tfds builders by source name. Making one imports no TensorFlow; only preparing data does."""

import contextlib
import importlib
import json
import os
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core import registered

from vitcls.errors import UserError, unknown
from vitcls.folders import user_folders

# Data sets that come with vitcls: module and class of the builder.
BUILT_IN = {
    "digits": "vitcls.data.digits.digits:Digits",
    "glyphs": "vitcls.data.glyphs.glyphs:Glyphs",
}
# The data folder of those that come prepared, in tfds' own format.
_PREPARED = {"digits": pathlib.Path(__file__).parents[1]}


def find_builder(source: str, *, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """The builder of `digits`, `glyphs` or `tfds:NAME[/CONFIG][:VERSION]`.

    Its `data_path` is the folder of that data set, configuration and version, prepared or not.
    The digits come prepared; a folder that an earlier version prepared below `data_dir` is read
    first, so that the runs begun with it continue.

    Args:
      source: As above.
      data_dir: Folder of all tfds data; None: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      UserError: No such data set, configuration or version, no home directory for its data, or
        prepared data that cannot be read.
    """
    if data_dir is not None:
        data_dir = str(pathlib.Path(data_dir).expanduser())
    elif source not in _PREPARED:
        user_folders.check_home(
            f"The data of {source}", "TFDS_DATA_DIR", settings="data.data_dir or --data_dir"
        )
    elif user_folders.home() is None and not os.environ.get("TFDS_DATA_DIR"):
        data_dir = str(_PREPARED[source])
    if source in BUILT_IN:
        module, name = BUILT_IN[source].split(":")
        make = getattr(importlib.import_module(module), name)
        with reading_prepared(source):
            builder = make(data_dir=data_dir)
            if source in _PREPARED and not is_prepared(builder):
                builder = make(data_dir=str(_PREPARED[source]))
            return builder
    name = source.removeprefix("tfds:")
    if not name:
        raise UserError("data.source='tfds:' names no data set; tfds:cifar10, for example.")
    try:
        with reading_prepared(source):
            return tfds.builder(name, data_dir=data_dir)
    except registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise unknown("tfds data set", name, known) from error
    # tfds raises ValueError for a configuration and AssertionError for a version it does not have.
    except (ValueError, AssertionError) as error:
        raise UserError(f"{source} cannot be opened: {error}") from error


@contextlib.contextmanager
def reading_prepared(source: str) -> Iterator[None]:
    """Raises `UserError` for prepared data whose JSON is empty or cut, as after a power loss."""
    try:
        yield
    except (json.JSONDecodeError, json_format.ParseError) as error:
        raise UserError(
            f"The prepared data of {source} cannot be read ({error}). Remove their folder, below "
            "data.data_dir or --data_dir, else ~/tensorflow_datasets; then they are prepared again."
        ) from error


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the data are complete on disk: only then tfds renames their folder."""
    return pathlib.Path(builder.data_path).exists()
