"""The folder of a run: the names of its files, and how a run takes, describes and finishes it."""

from pathlib import Path
from typing import Any

import jax

from vitcls.checkpoints import folders
from vitcls.files import expand, make_folder, read_or_set_aside, write_json
from vitcls.folders import ownership
from vitcls.processes import distributed


class Workdir:
    """A run's folder, which need not exist before `claim`.

    Attributes:
      path: The folder itself.
      checkpoints, config, manifest, model, predictions, profile, results, skipped: What is in it.
    """

    def __init__(self, path: str | Path):
        """Takes a path, which may begin with `~`; nothing is read or made."""
        self.path = expand(path)
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.manifest = self.path / "manifest.json"
        self.model = self.path / "model"
        self.predictions = self.path / "predictions"
        self.profile = self.path / "profile"
        self.results = self.path / "results.json"
        self.skipped = self.path / "skipped.jsonl"

    def check_own(self) -> None:
        """Raises `UserError` where a run would write over something that is not a run's."""
        ownership.check_run(self.path)

    def begun(self) -> Path | None:
        """Returns the folder if a run in it has saved a step; None: a new run begins."""
        return self.path if folders.has_steps(self.checkpoints) else None

    def finished_results(self, total_steps: int) -> dict[str, Any] | None:
        """Returns the results of a run that has done all its steps; None: there is more to do."""
        results = read_or_set_aside(self.results)
        is_finished = results is not None and results.get("step") == total_steps
        return results if is_finished else None

    def claim(self) -> None:
        """Makes the folder; raises `UserError` where processes do not share it."""
        if jax.process_index() == 0:
            make_folder(self.path)
        distributed.check_shared(self.path)

    def begin(self, manifest: dict[str, Any]) -> None:
        """Writes the first file of a new run: by it the folder is known to be a run's."""
        write_json(self.manifest, manifest)

    def describe(self, config: dict[str, Any]) -> None:
        """Writes the config with which the run begins or continues."""
        write_json(self.config, config)

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the results, by which the run is known to be finished."""
        write_json(self.results, results)
