"""What a run leaves beside its checkpoints and metrics: config, manifest, results, predictions."""

import importlib.metadata
import json
import logging
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vitcls import __version__, pretrained
from vitcls.data.sources import Split
from vitcls.files import read_or_set_aside, write_json, written_aside
from vitcls.step.devices import settings

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


def manifest(
    mesh: Mesh,
    splits: list[Split],
    files: pretrained.Files | None,
    *,
    teacher: str | None = None,
) -> dict[str, Any]:
    """Returns where a run's numbers come from: the environment, the data and the weights.

    Args:
      mesh: The devices.
      splits: All that are trained on or evaluated.
      files: Of the pretrained weights.
      teacher: Hash of the teacher's weights.
    """
    return environment(mesh) | {
        "data": describe_splits({split.name: split for split in splits}),
        "pretrained": files and _describe_files(files),
        "teacher": teacher,
        "continued": [],
    }


def describe_splits(splits: dict[str, Split]) -> dict[str, Any]:
    """Returns size, fingerprint and origin of each split, for JSON."""
    return {
        name: {"num_examples": len(split), "fingerprint": split.fingerprint} | split.origin()
        for name, split in splits.items()
    }


def _describe_files(files: pretrained.Files) -> dict[str, Any]:
    return {"source": files.source, "revision": files.revision, "sha256": files.sha256()}


def note_continuation(
    path: Path,
    mesh: Mesh,
    splits: list[Split],
    *,
    source: str,
    step: int,
    files: pretrained.Files | None = None,
) -> None:
    """Adds to the manifest at `path` that a run continues after `step`, and in what environment.

    A manifest that is lost or cut is made again, of what is known now.

    Args:
      path: Of the manifest.
      mesh: The devices that continue.
      splits: What the run continues with, in place of what there was.
      source: The checkpoint it began from; "": none.
      step: The last finished step.
      files: Where its pretrained weights are now, if they were moved.
    """
    content = read_or_set_aside(path)
    if content is None:
        began = {"source": source, "revision": None, "sha256": {}} if source else None
        content = manifest(mesh, splits, None) | {"pretrained": began, "rebuilt": True}
    before = content.get("jax_settings", {})
    for name, value in settings().items():
        if before.get(name, value) != value:
            log.warning(
                "%s=%s, and %s when this run began: it will not end with the same numbers.",
                name.upper(), value, before[name],
            )  # fmt: skip
    content["continued"].append({"step": step} | environment(mesh))
    content["data"] |= describe_splits({split.name: split for split in splits})
    if files is not None:
        content["pretrained"] = _describe_files(files)
    write_json(path, content)


def read_manifest(workdir: Path) -> dict[str, Any]:
    """Returns a run's manifest; {} where it is missing or damaged, as nothing depends on it."""
    try:
        content = json.loads((workdir / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recorded_fingerprints(workdir: Path) -> dict[str, str]:
    """Returns the fingerprints in a run's manifest by the names of splits; {} without one."""
    return {
        name: split["fingerprint"] for name, split in read_manifest(workdir).get("data", {}).items()
    }


def _git_commit() -> str | None:
    """The commit of this code, "-dirty" appended if files differ from it; None outside git."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():  # installed, perhaps inside somebody else's repository
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def save_predictions(path: Path, *, labels: np.ndarray, logits: np.ndarray, ids: list[str]) -> None:
    """Writes `labels` int32 (N,), `logits` float32 (N, K) and `ids` (N,) to an npz file."""
    path.parent.mkdir(exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, labels=labels, logits=logits, ids=np.asarray(ids))


def count_images(summary: dict[str, Any]) -> str:
    """Returns `360 images`, or `359 images, 1 skipped`, of a split's metrics."""
    skipped = f", {summary['num_skipped']} skipped" if summary.get("num_skipped") else ""
    return f"{summary['num_examples']} images{skipped}"


def last_line(results: dict[str, Any], workdir: Path, *, splits: tuple[str, ...]) -> str:
    """Returns `test accuracy 0.9806 (360 images) in 61 s -> runs/quickstart`, for example."""
    metrics = ", ".join(
        f"{name} accuracy {results['splits'][name]['accuracy']:.4f} "
        f"({count_images(results['splits'][name])})"
        for name in splits
    )
    return f"{metrics} in {results['seconds']:.0f} s -> {workdir}"
