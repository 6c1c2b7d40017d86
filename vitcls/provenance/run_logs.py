"""Opens the logs of a run: files of metrics, progress, and the metrics that are read late."""

import jax
from ml_collections import ConfigDict

from vitcls.checkpoints.saved import Saved
from vitcls.folders.workdir import Workdir
from vitcls.logs.progress import Progress
from vitcls.logs.writers import LateMetrics, MetricWriter
from vitcls.run.opened import Run


def open_writer(
    workdir: Workdir, config: ConfigDict, saved: Saved, start_step: int, total_steps: int
) -> MetricWriter:
    """Returns the writer, on process 0; lines that a continued run writes again are dropped."""
    again = []
    # The final evaluation, and one that a signal ended, are done again.
    if start_step == total_steps:
        again += config.data.eval_splits
    if saved.lacks_score:
        again += [config.eval.select_split]
    return MetricWriter(
        workdir.path,
        start_step=start_step,
        again=again,
        is_main=jax.process_index() == 0,
        wandb_project=config.log.wandb_project,
        config=config.to_dict(),
    )


def open_progress(config: ConfigDict, start_step: int) -> Progress:
    """Returns the progress of a run that has done `start_step` steps."""
    batch_size = config.train.global_batch_size
    return Progress(start_step, config.train.total_steps, global_batch_size=batch_size)


def late_metrics(run: Run, saved: Saved, writer: MetricWriter, progress: Progress) -> LateMetrics:
    """Returns what reads a step's metrics after the next step has begun."""
    return LateMetrics(
        writer,
        progress,
        every_steps=run.config.log.every_steps,
        window=saved.window,
        max_nonfinite=run.config.train.max_nonfinite,
        ids=run.train_ids,
    )
