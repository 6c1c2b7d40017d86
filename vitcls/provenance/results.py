"""The results of a run, as `results.json` has them, and in a line."""

from pathlib import Path
from typing import Any

from vitcls.checkpoints.saved import Saved
from vitcls.costs import footprint
from vitcls.data.skipped import Skipped
from vitcls.run.opened import Run
from vitcls.run.program import Program


def make_results(
    run: Run,
    program: Program,
    saved: Saved,
    summaries: dict[str, dict[str, Any]],
    skipped: Skipped | None,
    step: int,
    selected_step: int,
    seconds: float,
    speed: float | None,
) -> dict[str, Any]:
    """Returns the results, and logs how many images were skipped.

    Args:
      run: The finished run.
      program: What it computed.
      saved: Its progress when this process began.
      summaries: Metrics of each evaluated split, by name.
      skipped: List of the images that could not be decoded; None: such an image is an error.
      step: The last step of training.
      selected_step: The step whose weights were evaluated.
      seconds: Wall time of this process.
      speed: Training images per second of this process; None: it has not trained.
    """
    # This also reads what other processes have skipped, so it comes before the count.
    if skipped is not None:
        skipped.log_counts(run.splits)
    results = {
        "step": step,
        "seconds": saved.seconds + seconds,
        "images_per_second": speed or saved.images_per_second,
        "selected_step": selected_step,
        "train": {"num_skipped": 0 if skipped is None else skipped.count(run.train_split.name)},
        "splits": summaries,
    }
    if step < run.config.train.total_steps:
        results["stopped_early"] = True
    if speed:
        results["plan"] = footprint.planned_and_measured(
            program, dtype=run.config.model.dtype, images_per_second=speed
        )
    return results


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
