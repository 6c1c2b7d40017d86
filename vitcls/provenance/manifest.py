"""What computes a run, from which data and weights: `manifest.json` and the files beside it.

Process 0 writes them before the first step, and adds to them whenever the run is continued.
"""

import importlib.metadata
import logging
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vitcls import __version__, pretrained
from vitcls.data.sources import Split
from vitcls.files import read_or_set_aside, write_json
from vitcls.folders.workdir import Workdir
from vitcls.processes.devices import settings
from vitcls.provenance import seen
from vitcls.run.opened import Run
from vitcls.run.program import Program

log = logging.getLogger("vitcls")

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy",
    "pillow", "ml_collections", "safetensors", "huggingface_hub",
)  # fmt: skip


def environment(mesh: Mesh) -> dict[str, Any]:
    """Returns what computes: command, commit, versions, devices."""
    devices = mesh.devices.flatten()
    versions = {"python": platform.python_version(), "vitcls": __version__}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "command": sys.orig_argv,
        "git_commit": _git_commit(),
        "versions": versions,
        "jax_settings": settings(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": mesh.size,
            "processes": jax.process_count(),
        },
    }


def make_manifest(run: Run, teacher_sha256: str | None) -> dict[str, Any]:
    """Returns where a run's numbers come from: the environment, the data and the weights.

    Args:
      run: The run, opened.
      teacher_sha256: Hash of the teacher's weights; None: no distillation.
    """
    return environment(run.mesh) | {
        "data": describe_splits({split.name: split for split in run.splits}),
        "pretrained": None if run.files is None else _describe_files(run.files),
        "teacher": teacher_sha256,
        "continued": [],
    }


def write_start(workdir: Workdir, run: Run, program: Program, *, is_new: bool) -> None:
    """Writes, on process 0, what is known of a run before its first step, or before it continues.

    Args:
      workdir: The run's folder.
      run: The run, opened.
      program: Its program, whose config also has the size of the passes.
      is_new: Whether no step was saved yet.
    """
    if jax.process_index() != 0:
        return
    if is_new:
        # The manifest comes first: it is what a run's folder is recognised by.
        write_json(workdir.manifest, make_manifest(run, program.teacher_sha256))
        pretrained.write_config(workdir.model, run.model_config, run.processor)
        workdir.skipped.unlink(missing_ok=True)
    write_json(workdir.config, program.config.to_dict())
    seen.write(workdir, program.config, run.train_split, run.eval_splits)


def describe_splits(splits: dict[str, Split]) -> dict[str, Any]:
    """Returns size, fingerprint and origin of each split, for JSON."""
    return {
        name: {"num_examples": len(split), "fingerprint": split.fingerprint} | split.origin()
        for name, split in splits.items()
    }


def _describe_files(files: pretrained.Files) -> dict[str, Any]:
    return {"source": files.source, "revision": files.revision, "sha256": files.sha256()}


def note_continuation(
    workdir: Workdir, run: Run, *, step: int, files: pretrained.Files | None = None
) -> None:
    """Adds to the manifest, on process 0, that a run continues after `step`, and on what.

    A manifest that is lost or cut is made again, from what is known now.

    Args:
      workdir: The run's folder.
      run: What continues. Its splits replace those of the manifest.
      step: The last finished step.
      files: Where its pretrained weights are now, if they were moved.
    """
    if jax.process_index() != 0:
        return
    content = read_or_set_aside(workdir.manifest)
    if content is None:
        source = run.config.model.pretrained
        began = {"source": source, "revision": None, "sha256": {}} if source else None
        content = make_manifest(run, None)
        content |= {"pretrained": began, "rebuilt": True}
    before = content.get("jax_settings", {})
    for name, value in settings().items():
        if before.get(name, value) != value:
            log.warning(
                "%s=%s, and %s when this run began: it will not end with the same numbers.",
                name.upper(), value, before[name],
            )  # fmt: skip
    content["continued"].append({"step": step} | environment(run.mesh))
    content["data"] |= describe_splits({split.name: split for split in run.splits})
    if files is not None:
        content["pretrained"] = _describe_files(files)
    write_json(workdir.manifest, content)


def _git_commit() -> str | None:
    """The commit of this code, "-dirty" appended if files differ from it; None outside git."""
    here = Path(__file__).parents[2]
    # An installed package may lie inside another project's repository.
    if not (here / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
