"""Reads values of the configuration that are written as text, and flattens it."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls.errors import UserError, unknown


def parse_arg(arg: str, **defaults: str) -> dict[str, str]:
    """Reads a config file's argument, `name=value,name=value`.

    Args:
      arg: What follows the colon in `--config=FILE.py:ARG`.
      **defaults: The names that are known and their values when not given.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, equals, value = item.partition("=")
        if name not in defaults:
            raise unknown("argument of the config file", name, defaults)
        if not equals:
            raise UserError(f"The config file's argument {item!r} is not of the form name=value.")
        values[name] = value
    return values


def parse_fold(fold: str) -> tuple[int, int]:
    """Returns (2, 5) for "2/5"; raises `UserError` for anything else."""
    number, _, num_folds = fold.partition("/")
    if not (number.isdecimal() and num_folds.isdecimal() and 1 <= int(number) <= int(num_folds)):
        raise UserError(f"data.fold={fold!r} must be NUMBER/FOLDS: '1/5', '2/5', ... '5/5'.")
    if int(num_folds) < 2:
        raise UserError(f"data.fold={fold!r} holds everything out; use two folds or more.")
    return int(number), int(num_folds)


def absolute_source(source: str) -> str:
    """Returns a data source that does not depend on the working folder.

    A path that begins with ~ stays as it is, and so does the name of a data set.
    """
    scheme, _, rest = source.partition(":")
    path, mark, options = rest.partition("?")
    is_local = scheme in ("folder", "csv") or (scheme == "hf" and os.path.exists(path))
    if not is_local or not path or path.startswith("~"):
        return source
    return f"{scheme}:{os.path.abspath(path)}{mark}{options}"


def absolute_checkpoint(checkpoint: str) -> str:
    """Returns a checkpoint that does not depend on the working folder; a hub id stays as it is."""
    folder, mark, which = checkpoint, "", ""
    if not os.path.isdir(folder):
        folder, mark, which = checkpoint.rpartition("@")
    return f"{os.path.abspath(folder)}{mark}{which}" if os.path.isdir(folder) else checkpoint


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns `{"group.field": value}`; optimizer arguments as `optim.args.NAME`."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{name}.{key}": inner for key, inner in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def read_class_weights(how: str) -> str:
    """Returns `loss.class_weights` with a file's content, on one line, in place of its path.

    Raises:
      UserError: it is neither a name nor a JSON object of weights.
    """
    if how in ("none", "balanced", "effective"):
        return how
    path = Path(how).expanduser()
    try:
        table = json.loads(how if how.lstrip().startswith("{") else path.read_text())
        is_table = all(0 <= weight < math.inf for weight in table.values()) and any(table.values())
    # The file does not exist, is not JSON, is not an object, or has a value that is not a number.
    except (OSError, ValueError, TypeError, AttributeError):
        is_table = False
    if not is_table:
        raise UserError(
            f"loss.class_weights={how[:80]!r} must be none, balanced, effective, a JSON object of "
            'weights from 0 on, such as {"cat": 1, "dog": 2.5}, or a file with one.'
        )
    return json.dumps(table)
