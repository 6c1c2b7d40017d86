"""What a run that is continued must have in common with how it began."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.checkpoints import folders
from vitcls.checkpoints.manager import Checkpoints
from vitcls.checkpoints.saved import Saved
from vitcls.config.parse import absolute_checkpoint, absolute_source, flatten
from vitcls.costs.fitting import trains_statistics
from vitcls.data import sources
from vitcls.errors import UserError
from vitcls.folders.workdir import Workdir
from vitcls.processes import distributed
from vitcls.provenance import records
from vitcls.provenance.saved_config import check_same_run, read_saved_config
from vitcls.run.opened import Begun, Run
from vitcls.run.program import Program, learning_rate, with_fields

log = logging.getLogger("vitcls")


def read_begun(workdir: Workdir) -> Begun | None:
    """Returns what the run in a workdir chose, once it has saved a step; None: a new run begins.

    Raises:
      UserError: there are checkpoints, and the config that they were made with cannot be read.
    """
    if not folders.has_steps(workdir.checkpoints):
        return None
    return Begun(read_saved_config(workdir.config), workdir.model)


def facts(run: Run, *, is_continued: bool) -> dict[str, Any]:
    """Returns what every process of a run must agree on, by name."""
    return {
        **{f"config.{field}": value for field, value in flatten(run.config).items()},
        **{f"data of split {split.name!r}": split.fingerprint for split in run.splits},
        "workdir with checkpoints": is_continued,
    }


def check_run(
    run: Run, workdir: Workdir, begun: Begun, teacher_sha256: str | None
) -> pretrained.Files | None:
    """Compares a run with the one that its workdir holds, and warns of changed images.

    Args:
      run: What is asked for.
      workdir: The folder of the run that is continued.
      begun: What that run chose.
      teacher_sha256: Hash of the teacher's weights; None: no distillation.

    Returns:
      The files of the pretrained weights, if model.pretrained names another place than then.

    Raises:
      UserError: the run cannot be continued so.
    """
    moved = _find_moved(run, workdir, begun.config, teacher_sha256)
    check_same_run(run.config, workdir.config, moved=moved)
    fingerprints = records.recorded_fingerprints(workdir.path)
    results = workdir.finished_results(run.config.train.total_steps) or {}
    measured = results.get("splits", {}).items()
    fingerprints |= {name: one["fingerprint"] for name, one in measured if "fingerprint" in one}
    warn_of_changed_splits(fingerprints, run.eval_splits, select=run.config.eval.select_split)
    return moved.get("model.pretrained")


def claim(run: Run, workdir: Workdir, program: Program) -> tuple[Checkpoints, int, Saved]:
    """Makes the folder of a run that may begin or continue, and opens its checkpoints.

    Returns:
      The checkpoints, the last step that was saved (0: none), and the progress of the run then.

    Raises:
      UserError: processes do not share the folder, or the run cannot be continued so.
    """
    if jax.process_index() == 0:
        workdir.make()
    distributed.check_shared(workdir.path)
    checkpoints = Checkpoints(workdir.checkpoints, keep=run.config.checkpoint.keep)
    step, saved = checkpoints.latest_step() or 0, Saved()
    if step:
        saved = Saved.from_json(checkpoints.meta(step))
        check_step(saved, step, run, workdir, program)
    now = dict(data=run.train_split.fingerprint, teacher=program.teacher_sha256)
    return checkpoints, step, dataclasses.replace(saved, num_passes=program.num_passes, **now)


def check_step(
    saved: Saved,
    step: int,
    run: Run,
    workdir: Workdir,
    program: Program,
) -> None:
    """Compares a run with the checkpoint that it continues from, and warns of another rate.

    Args:
      saved: What the checkpoint says.
      step: The step after which it was saved.
      run: What is asked for.
      workdir: Its folder.
      program: What the run computes.

    Raises:
      UserError: data, teacher or passes are not what they were.
    """
    changes = rate_changes(run.config, workdir.config, step=step)
    for change in changes if jax.process_index() == 0 else ():
        log.warning("%s", change)
    split = run.train_split
    if saved.data != split.fingerprint:
        raise UserError(
            f"The training data ({split.name}, {len(split)} images) is not what this run began "
            "with: files or labels changed. Use another --workdir, or restore the data."
        )
    if saved.teacher != program.teacher_sha256:
        raise UserError(
            "loss.teacher has other weights than when this run began. Restore them, or name one "
            "step of its workdir (DIR@STEP), or use another --workdir."
        )
    if step < run.config.train.total_steps:
        check_same_passes(saved.num_passes, program)


def check_same_passes(num_passes: int, program: Program) -> None:
    """Raises `UserError` if a step has another number of passes, and that changes the result."""
    if trains_statistics(program) and num_passes != program.num_passes:
        raise UserError(
            f"This run began with {num_passes} passes per step and would continue with "
            f"{program.num_passes}: BatchNorm normalises each pass by itself. Choose "
            f"train.micro_batch and devices that make {num_passes}, or use another --workdir."
        )


def _find_moved(
    run: Run, workdir: Workdir, saved: ConfigDict, teacher_sha256: str | None
) -> dict[str, Any]:
    """Returns the fields that name the same content as when the run began, in another place.

    These are data.source, if the training images have the same fingerprint, and loss.teacher and
    model.pretrained, if the weights have the same hashes. model.pretrained comes with its files.

    Raises:
      UserError: the pretrained weights are not at their new place. Nothing is read at the old one,
        because the workdir has its own weights.
    """
    config, manifest = run.config, records.read_manifest(workdir.path)
    moved: dict[str, Any] = {}
    fingerprint = records.recorded_fingerprints(workdir.path).get(run.train_split.name)
    before = absolute_source(saved.data.source)
    if config.data.source != before and fingerprint == run.train_split.fingerprint:
        moved["data.source"] = None
    is_known = teacher_sha256 is not None and teacher_sha256 == manifest.get("teacher")
    if config.loss.teacher != absolute_checkpoint(saved.loss.teacher) and is_known:
        moved["loss.teacher"] = None
    asked, first = config.model.pretrained, manifest.get("pretrained")
    if asked != absolute_checkpoint(saved.model.pretrained) and asked and first:
        try:
            files = pretrained.find(asked, allow_pickle=config.model.allow_pickle)
        except UserError as error:
            raise UserError(
                f"model.pretrained={asked!r} cannot be compared with the weights that this run "
                f"began with: {error} Name {saved.model.pretrained!r}, as then: nothing is read "
                "there."
            ) from error
        if _only_weights(files.sha256()) == _only_weights(first["sha256"]):
            moved["model.pretrained"] = files
    for field in moved:
        log.info("%s names another place than when this run began, with the same content.", field)
    return moved


def _only_weights(sha256: dict[str, str]) -> dict[str, str]:
    # The JSON files describe network and preprocessing, which the workdir has itself.
    return {name: digest for name, digest in sha256.items() if not name.endswith(".json")}


def rate_changes(config: ConfigDict, path: Path, *, step: int) -> list[str]:
    """Returns a warning for each difference between a continued run's rate and the planned one.

    Args:
      config: The run's, as `resolve` returns it.
      path: Its config as it was saved.
      step: The last step that was saved.
    """
    changes, total_steps, saved = [], config.train.total_steps, read_saved_config(path)
    planned, restarts = saved.train.total_steps, tuple(saved.optim.restarts)
    before = with_fields(config, {"train.total_steps": planned, "optim.restarts": restarts})
    # The field and the new rule came in one version, so a config without it had the old rule.
    is_old = "restarts" not in json.loads(path.read_text())["optim"]
    if is_old and config.optim.schedule == "step" and config.optim.warmup_steps and step < planned:
        changes.append(
            "optim.schedule='step' divides at 30, 60 and 90 % of all steps; this run began when it "
            f"did so at those of what follows the warm-up. It continues with a learning rate of "
            f"{float(learning_rate(before)(step)):.2g}."
        )
    last = float(learning_rate(before)(step - 1))
    rate = float(learning_rate(config)(step))
    if planned >= total_steps or (config.optim.restarts == restarts and rate == last):
        return changes
    if config.optim.restarts != restarts:
        how = f"optim.restarts={config.optim.restarts} begins optim.schedule anew"
    else:
        how = (
            f"optim.schedule={config.optim.schedule!r} is laid out anew over all steps. Given in "
            f"the first longer start, --config.optim.restarts='{(*restarts, planned)}' begins it "
            f"anew after step {planned} instead, with its warm-up"
        )
    return [
        *changes,
        f"train.total_steps={total_steps} lengthens a run of {planned} steps: the learning rate "
        f"goes from {last:.2g} in step {step} to {rate:.2g} in the next. {how}.",
    ]


def warn_of_changed_splits(
    known: dict[str, str], splits: dict[str, sources.Split], *, select: str
) -> None:
    """Warns of every evaluated split that has changed.

    Args:
      known: The earlier fingerprints by the splits' names.
      splits: The splits that are evaluated now, by name.
      select: Name of the split that chooses the checkpoint.
    """
    for name, split in splits.items():
        if known.get(name, split.fingerprint) != split.fingerprint:
            log.warning(
                "Split %r has changed since it was last evaluated or described here: files or "
                "labels differ, and it now has %d images. Its earlier figures are not "
                "comparable%s.", name, len(split),
                ", and earlier checkpoints were scored on other images" if name == select else "",
            )  # fmt: skip
