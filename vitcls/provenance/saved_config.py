"""Reads the configs that runs have saved, and compares a continued run with its own."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls.config.checks import unused_fields
from vitcls.config.fields import FIELDS, RUN_FIELDS, default_config
from vitcls.config.parse import absolute_checkpoint, absolute_source, flatten
from vitcls.errors import UserError
from vitcls.files import read_json


def read_saved_config(path: Path) -> ConfigDict:
    """Reads a run's `config.json`; fields that are newer than the file have their defaults.

    Raises:
      UserError: the file is missing, empty or cut, is not a config, or has fields that are gone.
    """
    remedy = "put it back, or use another --workdir"
    what = "the config of a run that has checkpoints"
    saved = read_json(path, what=what, remedy=remedy)
    try:
        gone = [name for name in flatten(ConfigDict(saved)) if not _is_known(name)]
        config = restore_config(saved)
    # The file is JSON, but not a config.
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}, {what}, cannot be read ({error}): {remedy}.") from error
    if gone:
        raise UserError(
            f"{path} has fields that this version of vitcls does not have: {', '.join(gone)}. "
            "Continue the run with the version that began it, or use another --workdir."
        )
    return config


def _is_known(name: str) -> bool:
    return name in FIELDS or name.startswith("optim.args.")


def restore_config(saved: dict[str, Any]) -> ConfigDict:
    """Returns the config of a run, of which `saved` is the content of its `config.json`."""
    config = default_config()
    # JSON has lists in place of tuples.
    with config.ignore_type():
        config.update(saved)
    if "division" not in saved.get("data", {}):
        # Runs that are older than the field were divided in this way.
        config.data.division = "position"
    return config


def check_same_run(config: ConfigDict, path: Path, *, moved: Collection[str] = ()) -> None:
    """Raises `UserError` if the run saved at `path` began with other fields that change its result.

    Args:
      config: What is asked for. An empty data.division asks for that of the run.
      path: File of the saved config.
      moved: Fields that may differ, because they name the same content in another place.
    """
    asked, saved = (
        flatten(ConfigDict(json.loads(json.dumps(one.to_dict()))))
        for one in (config, read_saved_config(path))
    )
    asked["data.division"] = asked["data.division"] or saved["data.division"]
    unused = unused_fields(saved) | unused_fields(asked)
    differences = [
        f"  {field}: {saved.get(field)!r} there, {asked.get(field)!r} asked for"
        for field in sorted(saved.keys() | asked.keys())
        if field not in (*RUN_FIELDS, *moved, *unused) and saved.get(field) != asked.get(field)
        and not _may_differ(field, saved, asked)
    ]  # fmt: skip
    if differences:
        raise UserError(
            f"{path.parent} holds a run of another config:\n"
            + "\n".join(differences)
            + "\nUse another --workdir, or the fields it was started with."
        )


def _may_differ(field: str, saved: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a field is left open, or differs only after the planned steps."""
    before, after = saved.get(field), asked.get(field)
    if field in ("optim.warmup_steps", "eval.every_steps"):
        return after is None
    # Earlier versions saved relative paths, and a sweep asks with them.
    if field == "data.source":
        return absolute_source(before) == absolute_source(after)
    if field in ("model.pretrained", "loss.teacher"):
        return absolute_checkpoint(before) == absolute_checkpoint(after)
    if field in ("train.total_steps", "train.total_epochs"):
        return 0 < before < after
    if field == "optim.restarts":
        kept, added = after[: len(before)], after[len(before) :]
        return kept == before and all(step >= saved["train.total_steps"] for step in added)
    return False
