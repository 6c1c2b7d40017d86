"""The folder of a run: the names of its files. No other module spells them.

It imports neither jax nor data, so that a launcher can look into many workdirs at once.
"""

from pathlib import Path
from typing import Any

from vitcls.files import expand, make_folder, read_or_set_aside, write_json
from vitcls.folders import ownership


class Workdir:
    """A run's folder, which need not exist.

    Attributes:
      path: The folder itself.
      checkpoints: Folder of the saved steps.
      config: The config, as JSON.
      decision: When the network answers, as JSON; a run with a target has it.
      manifest: What computed the run, from which data and weights, as JSON.
      metrics: Lines of metrics, as JSON.
      model: Folder with the network's config and processor.
      nonfinite: Steps without a finite loss, as lines of JSON.
      predictions: Folder with one npz file for each evaluated split.
      profile: Folder of the profiler's trace.
      results: The final metrics, as JSON.
      seen: Hashes of the images that were trained on and evaluated, as npz.
      skipped: Images that could not be read, as lines of JSON.
    """

    def __init__(self, path: str | Path):
        """Takes a path, which may begin with `~`; nothing is read or made."""
        self.path = expand(path)
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.model = self.path / "model"
        self.decision = self.model / "decision.json"
        self.nonfinite = self.path / "nonfinite.jsonl"
        self.predictions = self.path / "predictions"
        self.profile = self.path / "profile"
        self.results = self.path / "results.json"
        self.seen = self.path / "seen.npz"
        self.skipped = self.path / "skipped.jsonl"

    def check_own(self) -> None:
        """Raises `UserError` where a run would write over something that is not a run's."""
        # A trace is not listed: its files have new names each time.
        written = (
            self.manifest, self.config, self.model, self.checkpoints, self.metrics, self.skipped,
            self.nonfinite, self.predictions, self.results, self.seen,
        )  # fmt: skip
        names = [path.name for path in written]
        ownership.check("--workdir", self.path, names, is_own=self._is_run)

    def _is_run(self) -> bool:
        return (
            (self.checkpoints / "lock").is_file()
            or ownership.has_keys(self.manifest, "command", "data", "versions")
            or ownership.has_keys(self.config, "data", "model", "optim", "train")
        )

    def make(self) -> None:
        """Makes the folder; raises `UserError` where that is not possible."""
        make_folder(self.path)

    def finished_results(self, total_steps: int) -> dict[str, Any] | None:
        """Returns the results of a run that has done all its steps; None: there is more to do."""
        results = read_or_set_aside(self.results)
        return results if results is not None and is_finished(results, total_steps) else None

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the results, by which the run is known to be finished."""
        write_json(self.results, results)


def is_finished(results: dict[str, Any], total_steps: int | None) -> bool:
    """Whether the content of `results.json` is from the last step of a run."""
    return results.get("step") == total_steps or bool(results.get("stopped_early"))
