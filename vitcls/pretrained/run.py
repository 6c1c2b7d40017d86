"""The workdir of one of our own runs as a checkpoint: `DIR`, `DIR@best`, `DIR@last`, `DIR@STEP`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from vitcls.checkpoints.manager import Checkpoints
from vitcls.errors import UserError
from vitcls.pretrained import values
from vitcls.pretrained.find import CONFIG
from vitcls.processes.devices import start_devices
from vitcls.step import adapt
from vitcls.step.train_step import fold_lora


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint of a run."""

    directory: Path
    which: str | None  # "best", "last" or a step; None: the best if there is one, else the last

    @property
    def model(self) -> Path:
        """Folder of the JSON files in Hugging Face format."""
        return self.directory / "model"

    def step(self) -> int:
        """The training step after which it was saved. Raises what `read_variables` does."""
        with self._open() as checkpoints:
            return self._step(checkpoints)

    def steps(self) -> list[int]:
        """The same as a list; for `DIR@all`, the steps of all kept checkpoints."""
        with self._open() as checkpoints:
            all_steps = checkpoints.steps() if self.which == "all" else []
            return all_steps or [self._step(checkpoints)]

    def read_variables(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the variables as float32 numpy arrays: the averaged ones if there are any.

        LoRA's additions are folded into the kernels.

        Args:
          shapes: The network's variables as nested dicts of `jax.ShapeDtypeStruct`.

        Raises:
          UserError: the checkpoint does not exist, or its values are damaged.
          StorageError: it cannot be read.
        """
        with self._open() as checkpoints:
            device = SingleDeviceSharding(jax.local_devices()[0])
            step = self._step(checkpoints)
            item = "ema" if "ema" in checkpoints.item_names(step) else "params"
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                adapt.merge(shapes, checkpoints.lora_shapes(step, item)),
            )
            restored = checkpoints.restore(step, {item: target})[item]
        variables = jax.tree.map(np.asarray, fold_lora(restored))
        values.refuse(
            [values.flaw(name, leaf) for name, leaf in flatten_dict(variables, sep="/").items()],
            source=f"{self.directory}@{step}",
            advice="Choose another step of this run.",
        )
        return variables

    def _open(self) -> Checkpoints:
        start_devices()  # Orbax asks jax for this process' index
        return Checkpoints(self.directory / "checkpoints", read_only=True)

    def _step(self, checkpoints: Checkpoints) -> int:
        steps = checkpoints.steps()
        if self.which in map(str, steps):  # even if the others are damaged
            return int(self.which)
        best = checkpoints.best_step()
        chosen = {
            None: checkpoints.latest_step() if best is None else best,
            "best": best,
            "last": checkpoints.latest_step(),
        }.get(self.which, self.which)
        if str(chosen) not in map(str, steps):
            raise UserError(
                f"{self.directory} has no checkpoint {self.which or 'best'!r}; it has the steps "
                f"{steps}{'' if best is None else f', {best} the best'}."
            )
        return int(chosen)


def find_run(checkpoint: str | Path) -> Run | None:
    """Returns the run that `checkpoint` refers to, or None if it is not a workdir."""
    before, _, which = str(checkpoint).rpartition("@")
    for name, step in ((str(checkpoint), None), (before, which)):
        directory = Path(name).expanduser()
        is_workdir = (directory / "model" / CONFIG).is_file()
        if name and is_workdir and (directory / "checkpoints").is_dir():
            return Run(directory, step)
    return None
