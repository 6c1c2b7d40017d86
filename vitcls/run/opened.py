"""Opens a run: everything that its config names is found, checked and fitted together.

`vitcls.main` trains the run, `vitcls.plan` counts what it needs, and `vitcls.check_data` shows its
first batches. Nothing is on the devices yet.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.config.checks import check_config
from vitcls.costs.fitting import with_fitting_passes
from vitcls.data import loader, sources
from vitcls.data.skipped import Skipped
from vitcls.data.sources.division import DIVISIONS
from vitcls.pretrained.teacher import Teacher, open_teacher
from vitcls.processes.devices import check_settings, start_devices
from vitcls.run.network import open_model, train_transform
from vitcls.run.passes import pass_sizes
from vitcls.run.program import Program, make_program, with_fields
from vitcls.run.resolve import resolve
from vitcls.run.splits import open_splits
from vitcls.step import optim, sharding
from vitcls.step.train_step import Batch

log = logging.getLogger("vitcls")


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a run that is continued chose when it began.

    Attributes:
      config: As its `config.json` has it.
      model: Folder with the config and the processor of its network.
    """

    config: ConfigDict
    model: Path


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made from.

    Attributes:
      config: With every field filled in that follows from data, checkpoint and devices.
      train_split: The images to train on.
      eval_splits: The splits that are evaluated, by name.
      files: The pretrained checkpoint; None: the run has none, or has its own already.
      model_config: The network's.
      processor: How the network's images are prepared.
      mesh: The devices.
    """

    config: ConfigDict
    train_split: sources.Split
    eval_splits: dict[str, sources.Split]
    files: pretrained.Files | None
    model_config: pretrained.Config
    processor: pretrained.Processor
    mesh: Mesh

    @property
    def splits(self) -> list[sources.Split]:
        """The split to train on, then those that are evaluated."""
        return [self.train_split, *self.eval_splits.values()]

    def read_variables(self) -> Any:
        """Returns the pretrained variables, numpy arrays; None without a pretrained checkpoint."""
        if self.files is None:
            return None
        new_head = self.config.model.head == "new"
        return pretrained.read_variables(self.files, self.model_config, new_head=new_head)

    def fill_caches(self) -> None:
        """Prepares the images of the splits that a cache on disk keeps."""
        for split in self.splits:
            split.fill_cache(num_threads=self.config.data.num_threads)

    def train_batches(
        self, start_step: int, *, skipped: Skipped | None = None, total_steps: int | None = None
    ) -> Iterator[Batch]:
        """Yields this process' rows of the batches of steps [start_step, total_steps)."""
        if total_steps is None:
            total_steps = self.config.train.total_steps
        return loader.train_batches(
            self.train_split,
            start_step=start_step,
            total_steps=total_steps,
            transform=train_transform(self.config, self.processor),
            **self._order(),
            **self._loading(skipped),
        )

    def train_ids(self, step: int) -> list[str]:
        """Returns the ids of the images of a step, counted from 1, over all processes."""
        return loader.train_ids(self.train_split, step, **self._order())

    def eval_batches(self, name: str, *, skipped: Skipped | None = None) -> loader.EvalBatches:
        """Returns this process' rows of one pass over an evaluated split."""
        return loader.eval_batches(
            self.eval_splits[name],
            global_batch_size=self.config.eval.batch_size,
            transform=self.processor.pixels,
            **self._loading(skipped),
        )

    def _order(self) -> dict[str, Any]:
        train, sampling = self.config.train, self.config.data.sampling
        return dict(global_batch_size=train.global_batch_size, seed=train.seed, sampling=sampling)

    def _loading(self, skipped: Skipped | None) -> dict[str, Any]:
        return dict(
            skipped=skipped,
            num_threads=self.config.data.num_threads,
            num_workers=self.config.data.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def open_teacher(self) -> Teacher | None:
        """Loads the network that this run distils from; None: `loss.teacher` names none."""
        checkpoint, dtype = self.config.loss.teacher, self.config.model.dtype
        return open_teacher(checkpoint, self.processor, dtype=dtype) if checkpoint else None

    def make_program(self, teacher: Teacher | None = None) -> Program:
        """Returns what the devices compute; `train.micro_batch=0` takes the passes that fit."""
        make = functools.partial(
            make_program,
            model_config=self.model_config,
            processor=self.processor,
            mesh=self.mesh,
            class_names=self.train_split.class_names,
            class_counts=self.train_split.class_counts(),
            teacher=teacher,
        )
        if self.config.train.micro_batch != 0:
            return make(self.config)
        program = with_fitting_passes(
            lambda size: make(with_fields(self.config, {"train.micro_batch": size})),
            pass_sizes(self.config, self.mesh.size),
        )
        # A continued run then makes the same passes.
        chosen = with_fields(self.config, {"train.micro_batch": program.pass_size})
        return dataclasses.replace(program, config=chosen)


def open_run(
    config: ConfigDict,
    *,
    devices: list[jax.Device] | None = None,
    begun: Begun | None = None,
    train_split: sources.Split | None = None,
) -> Run:
    """Opens the data and the checkpoint of a config, and fits them to each other.

    Args:
      config: As `vitcls.config.default_config` lays it out; it is not changed.
      devices: The devices to use; default all.
      begun: What a run that is continued chose when it began.
      train_split: Stands in for data that are not on this machine, by `class_names`,
        `class_counts()` and its length; nothing is evaluated then.

    Raises:
      UserError: a field, a data set or a checkpoint does not fit.
    """
    check_settings()
    check_config(config)
    optim.check_args(config.optim.name, dict(config.optim.args))
    config = ConfigDict(config.to_dict())
    if begun is not None and not config.data.division:
        config.data.division = begun.config.data.division
        if config.data.division == "position":
            log.info(
                "This run began before images were chosen by a hash of their ids, and keeps its "
                "data.division='position': the same images are held out, sampled and tested on."
            )
    config.data.division = config.data.division or DIVISIONS[0]
    # The data come first: the head has their classes. The devices come last: a mistake in the
    # config, the data or the checkpoint is found without them.
    eval_splits = {}
    if train_split is None:
        train_split, eval_splits = open_splits(config, is_continued=begun is not None)
    files, model_config, processor = open_model(
        config, train_split.class_names, own=None if begun is None else begun.model
    )
    if devices is None:
        devices = start_devices()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=devices)
    config = resolve(
        config,
        num_train=len(train_split),
        image_size=processor.size,
        num_devices=mesh.size,
        saved=None if begun is None else begun.config,
    )
    return Run(config, train_split, eval_splits, files, model_config, processor, mesh)
