"""What a run leaves: its manifest is read, its predictions are written."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vitcls.files import written_aside
from vitcls.folders.workdir import Workdir


def read_manifest(workdir: str | Path) -> dict[str, Any]:
    """Returns a run's manifest; {} where it is missing or damaged, as nothing depends on it."""
    try:
        content = json.loads(Workdir(workdir).manifest.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recorded_fingerprints(workdir: str | Path) -> dict[str, str]:
    """Returns the fingerprints in a run's manifest by the names of splits; {} without one."""
    return {
        name: split["fingerprint"] for name, split in read_manifest(workdir).get("data", {}).items()
    }


def save_predictions(path: Path, *, labels: np.ndarray, logits: np.ndarray, ids: list[str]) -> None:
    """Writes `labels` int32 (N,), `logits` float32 (N, K) and `ids` (N,) to an npz file."""
    path.parent.mkdir(exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, labels=labels, logits=logits, ids=np.asarray(ids))
