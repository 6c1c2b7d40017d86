"""Results of runs as small files that outlive the runs, and the page made of these files."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from vitcls.analysis import paired
from vitcls.analysis.groups import find_workdirs, why_unfinished
from vitcls.analysis.run import Run, read_run
from vitcls.errors import UserError

_HEAD = (
    "recipe", "split", "images", "accuracy", "spread", "lowest to highest", "seeds", "steps",
    "seconds", "where",
)  # fmt: skip
_ABOUT = """\
# Results

```
python -m vitcls.analysis.results docs/results --add=runs/pretraining
```

The command adds the runs of a folder and makes this page from all files in `docs/results`. It is
never edited by hand. Each row has the runs that differ in nothing but the seed: the mean of their
accuracies, the standard deviation over seeds, and the range. Seconds are also a mean, on a machine
that may have had other work to do.
"""


def read_results(directory: str) -> dict[str, Any]:
    """Returns `{"runs": [...]}` for a workdir, or for a folder of workdirs.

    Raises:
      UserError: A run has not finished, or the folder has none.
    """
    return {"runs": [_read_run(path) for path in find_workdirs([directory])]}


def _read_run(workdir: Path) -> dict[str, Any]:
    run = read_run(workdir)
    if why := why_unfinished(run):
        raise UserError(f"{workdir} cannot be kept: {why}. Run its command again, or move it away.")
    return {
        "command": _command(run),
        "seed": run.config["train"]["seed"],
        "results": {key: value for key, value in run.results.items() if key != "plan"},
        "eval_splits": run.config["data"]["eval_splits"],
        **{key: run.manifest.get(key) for key in ("git_commit", "versions", "devices")},
    }


def _command(run: Run) -> str:
    """The command without what belongs to one machine or one run: Python, workdir, seed."""
    parts = [
        part
        for part in map(str, (run.manifest.get("command") or [])[1:])
        if not re.match("--?(workdir|config.train.seed)=", part)
    ]
    return shlex.join(["python", *parts])


def to_markdown(folder: Path) -> str:
    """The page for all files in a folder.

    Raises:
      UserError: The files are missing, or one is damaged.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(f"{folder} has no results; add some with --add=WORKDIR.")
    lines = [_ABOUT]
    for path in paths:
        try:
            runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
            rows = _rows(runs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a file of vitcls.analysis.results ({error!r}); add its runs again."
            ) from error
        cells = [_HEAD, ["---"] * len(_HEAD), *rows]
        lines += [f"## {path.stem}", "", *(f"| {' | '.join(row)} |" for row in cells), ""]
    return "\n".join(lines)


def _rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    recipes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for split in run["eval_splits"]:
            recipes.setdefault((run["command"], split), []).append(run)
    rows = []
    for (command, split), same in recipes.items():
        metrics = [run["results"]["splits"][split] for run in same]
        values = np.array([one["accuracy"] for one in metrics])
        mean, spread, _, _ = paired.over_seeds(values)
        rows.append([
            f"`{command}`".replace("|", "\\|"), split, _all(one["num_examples"] for one in metrics),
            f"{mean:.4f}", "–" if len(values) < 2 else f"{spread:.4f}",
            f"{values.min():.4f} to {values.max():.4f}",
            ", ".join(str(seed) for seed in sorted(run["seed"] for run in same)),
            _all(run["results"]["step"] for run in same),
            f"{np.mean([run['results']['seconds'] for run in same]):.0f}",
            _all(_where(run) for run in same),
        ])  # fmt: skip
    return rows


def _where(run: dict[str, Any]) -> str:
    devices, versions, commit = run["devices"], run["versions"], str(run["git_commit"])[:8]
    return f"{devices['count']} {devices['kind']}, jax {versions['jax']}, {commit}"


def _all(values: Any) -> str:
    """The different values, separated by commas."""
    return ", ".join(dict.fromkeys(map(str, values)))
