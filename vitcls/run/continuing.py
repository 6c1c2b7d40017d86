"""What a run that is continued must have in common with how it began."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.config.parse import flatten
from vitcls.config.saved import read_saved_config
from vitcls.data import sources
from vitcls.errors import UserError
from vitcls.run import records
from vitcls.run.program import Program, trains_statistics
from vitcls.run.teacher import Teacher

log = logging.getLogger("vitcls")


def facts(
    config: ConfigDict,
    train_split: sources.Split,
    eval_splits: dict[str, sources.Split],
    *,
    begun: Path | None,
) -> dict[str, Any]:
    """Returns what every process of a run must agree on, by name.

    Args:
      config: The run's, as `resolve` returns it.
      train_split: The split to train on.
      eval_splits: By name, those that are evaluated.
      begun: The workdir of a run that goes on.
    """
    fingerprints = {split.name: split.fingerprint for split in [train_split, *eval_splits.values()]}
    return {
        **{f"config.{field}": value for field, value in flatten(config).items()},
        **{f"data of split {name!r}": value for name, value in fingerprints.items()},
        "workdir with checkpoints": begun is not None,
    }


def find_moved(
    config: ConfigDict, begun: Path, train_split: sources.Split, teacher: Teacher | None
) -> dict[str, Any]:
    """Returns the fields that name what a run began with in another place than then.

    These are data.source, if the images to train on have the fingerprint that they had, and
    loss.teacher and model.pretrained, if the weights have the same hashes.

    Args:
      config: What is asked for.
      begun: The run's workdir.
      train_split: The split to train on.
      teacher: The teacher.

    Returns:
      The fields, model.pretrained with its files.

    Raises:
      UserError: there is nothing at the new place of the pretrained weights. Where they are given
        as they were, nothing is read: the workdir has its own.
    """
    saved, manifest = read_saved_config(begun / "config.json"), records.read_manifest(begun)
    moved: dict[str, Any] = {}
    fingerprint = records.recorded_fingerprints(begun).get(train_split.name)
    if config.data.source != saved.data.source and fingerprint == train_split.fingerprint:
        moved["data.source"] = None
    taught = teacher is not None and teacher.sha256 == manifest.get("teacher")
    if config.loss.teacher != saved.loss.teacher and taught:
        moved["loss.teacher"] = None
    asked, first = config.model.pretrained, manifest.get("pretrained")
    if asked != saved.model.pretrained and asked and first:
        try:
            files = pretrained.find(asked, allow_pickle=config.model.allow_pickle)
        except UserError as error:
            raise UserError(
                f"model.pretrained={asked!r} cannot be compared with what this run began with: "
                f"{error} Name {saved.model.pretrained!r}, as then, and nothing is read there."
            ) from error
        if _only_weights(files.sha256()) == _only_weights(first["sha256"]):
            moved["model.pretrained"] = files
    for field in moved:
        log.info("%s names another place than when this run began, with the same content.", field)
    return moved


def _only_weights(sha256: dict[str, str]) -> dict[str, str]:
    # What the JSON files say of network and preprocessing is in the workdir.
    return {name: digest for name, digest in sha256.items() if not name.endswith(".json")}


def check_same_teacher(sha256: str | None, teacher: Teacher | None) -> None:
    """Raises `UserError` when the teacher's weights are not those with this hash."""
    if sha256 != (teacher and teacher.sha256):
        raise UserError(
            "loss.teacher has other weights than when this run began. Restore them, or name one "
            "step of its workdir (DIR@STEP), or use another --workdir."
        )


def check_same_passes(num_passes: int, program: Program, config: ConfigDict) -> None:
    """Raises `UserError` when a step has another number of passes and that changes the result."""
    if trains_statistics(config, program) and num_passes != program.num_passes:
        raise UserError(
            f"This run began with {num_passes} passes per step and would go on with "
            f"{program.num_passes}: BatchNorm normalises each pass by itself. Choose "
            f"train.micro_batch and devices that make {num_passes}, or use another --workdir."
        )
