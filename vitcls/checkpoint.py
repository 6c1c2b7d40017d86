"""Checkpoints of a run: a thin layer over Orbax.

A step directory holds the items `params` (variables as trained), `opt_state`, `ema` (variables, if
averaged) and `meta` (JSON), so that each can be read alone. Variables are whole networks; with LoRA
its factors lie beside the kernels as they were, and are folded in by who reads them.
"""

import contextlib
import json
import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from vitcls import adapt, distributed, sharding
from vitcls.errors import StorageError, UserError
from vitcls.train_step import TrainState, fold_lora

PyTree = Any
_ITEMS = ("params", "opt_state", "ema")

# Orbax warns at every save without a score, although most checkpoints are not evaluated, and where
# a directory is opened to be read only, as we ask for.
_EXPECTED = ("tracked_metric", "Given directory is read only")
logging.getLogger("absl").addFilter(
    lambda record: not any(text in record.getMessage() for text in _EXPECTED)
)


class Checkpoints:
    """The checkpoints below one directory: the newest few, and the best one."""

    def __init__(self, directory: Path, *, keep: int = 1, read_only: bool = False):
        """Opens the directory, which is made if needed and not `read_only`.

        Args:
          keep: Number of newest checkpoints to keep; the one with the highest score stays besides.
        """
        if read_only and not directory.is_dir():
            raise UserError(f"{directory} does not exist: no checkpoint has been saved there.")
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(
                get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_score,  # without it the scores never reach the disk
            read_only=read_only,
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
            cleanup_tmp_directories=not read_only,
            enable_background_delete=False,
        )
        # Without handlers a directory opened anew would know nothing of its items' contents.
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=options,
            item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type, *_) -> None:
        # However a run ends, the save in flight is finished; its failure must not hide an error.
        try:
            with contextlib.suppress(StorageError) if error_type else contextlib.nullcontext():
                self.wait()
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest score, the latest of equals; None if no score was saved."""
        scored = {
            step: _score(metrics)
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step)) is not None
        }
        return max(scored, key=lambda step: (scored[step], step), default=None)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, items: dict[str, PyTree], *, meta: dict[str, Any], score: float | None
    ) -> None:
        """Starts to save; returns once the arrays are copied, the files are written behind.

        Args:
          items: Name, one of `params`, `opt_state` and `ema`, -> tree of arrays.
          meta: What JSON can hold.
          score: Higher is better; None for a checkpoint that was not evaluated.

        Raises:
          StorageError: the disk has no room, or this or the previous save failed.
        """
        self.wait()  # for the previous save, as Orbax would: what it takes is then known
        self._check_room(step, items)
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args),
                metrics=None if score is None else {"score": _finite(score)},
                force=True,
            )
        except Exception as error:
            raise self._failure("could not be saved", step, error) from error

    def add_score(self, step: int, score: float) -> None:
        """Gives a checkpoint that is there, and has no score, what `save` would have taken."""
        if jax.process_index() == 0:
            # As Orbax has it; renamed, so that it is there as a whole.
            aside = self._manager.directory / str(step) / "metrics.tmp"
            aside.mkdir(exist_ok=True)
            (aside / "metrics").write_text(json.dumps({"score": _finite(score)}))
            aside.rename(aside.with_suffix(""))
        distributed.wait_for_all(f"score of {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Returns once what was saved is on disk; raises `StorageError` if it could not be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure("could not be saved", self.latest_step(), error) from error

    def restore(self, step: int, items: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns the named items of `step`.

        Args:
          items: Name -> tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          UserError: a dtype differs, which Orbax would cast without a word.
          StorageError: a file is missing or damaged.
        """
        try:
            saved = self._manager.item_metadata(step)
            for name, tree in items.items():
                _check_dtypes(f"{self._manager.directory}/{step}/{name}", saved[name], tree)
            args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except UserError:
            raise
        except Exception as error:
            raise self._failure("could not be read", step, error) from error
        return {name: restored[name] for name in items}

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what `save` was given as `meta`."""
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["meta"]
        except Exception as error:
            raise self._failure("could not be read", step, error) from error

    def item_names(self, step: int) -> set[str]:
        """Names of what was saved at `step`."""
        return {
            name for name, item in self._manager.item_metadata(step).items() if item is not None
        }

    def lora_shapes(self, step: int, item: str) -> dict[str, PyTree]:
        """Returns LoRA's factors among an item's variables, `jax.ShapeDtypeStruct`, if any."""
        saved = traverse_util.flatten_dict(self._manager.item_metadata(step)[item].tree)
        return traverse_util.unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                for path, leaf in saved.items()
                if path[-1] in adapt.LORA
            }
        )

    def _check_room(self, step: int, items: dict[str, PyTree]) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self._manager.directory).free
        if needed > free:
            raise StorageError(
                f"The checkpoint of step {step} needs {needed / 1e6:.1f} MB in "
                f"{self._manager.directory}, where {free / 1e6:.1f} MB are free; make room and run "
                "the same command again."
            )

    def _failure(self, what: str, step: int | None, error: Exception) -> StorageError:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return StorageError(
            f"The checkpoint of step {step} in {self._manager.directory} {what}: {first_line}"
        )


def state_items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: whole networks, so that each can be read without this run."""
    items = {"params": state.variables(), "opt_state": state.opt_state}
    return items | ({} if state.ema is None else {"ema": state.averages()})


def restore_state(
    checkpoints: Checkpoints, step: int, shapes: TrainState, shardings: TrainState
) -> TrainState:
    """Returns the state after `step`, bit for bit as it was saved; it has no teacher."""
    target = jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        shapes,
        shardings,
    )
    items = checkpoints.restore(step, state_items(target))

    def trained(variables):  # the part of the network that `target` says is trained
        return {
            "params": adapt.subtree(variables["params"], target.params),
            "batch_stats": variables.get("batch_stats", {}),
        }

    return TrainState(
        step=sharding.put(np.int32(step), shardings.step),
        frozen=adapt.subtree(items["params"]["params"], target.frozen),
        opt_state=items["opt_state"],
        ema=None if target.ema is None else trained(items["ema"]),
        **trained(items["params"]),
    )


def restore_eval_variables(checkpoints: Checkpoints, step: int, state: TrainState) -> Any:
    """Returns the variables to evaluate as they were after `step`, placed like `state`'s."""
    name = "params" if state.ema is None else "ema"
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state.averages(),
    )
    return fold_lora(checkpoints.restore(step, {name: target})[name])


def has_steps(directory: Path) -> bool:
    """Whether a complete checkpoint lies in `directory`, which need not exist."""
    return directory.is_dir() and any(path.name.isdigit() for path in directory.iterdir())


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _finite(score: float) -> float:
    # Ranking must survive a diverged evaluation: nan would compare as the best or not at all.
    return score if math.isfinite(score) else -sys.float_info.max


def _check_dtypes(where: str, saved: PyTree, wanted: PyTree) -> None:
    saved = _leaves_by_name(saved)
    for name, leaf in _leaves_by_name(wanted).items():
        if name not in saved:
            raise UserError(f"{where} has no {name}: it was saved by another network or optimizer.")
        if saved[name].dtype != leaf.dtype:
            raise UserError(f"{where}/{name} is {saved[name].dtype}, but {leaf.dtype} is wanted.")


def _leaves_by_name(tree: PyTree) -> dict[str, Any]:
    # By name, not by path: metadata has dicts where an optimizer's state has named tuples.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
