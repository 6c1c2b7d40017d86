"""Checkpoints of a run: a thin layer over Orbax.

A step directory holds the items `params` (variables as trained), `opt_state`, `ema` (variables, if
averaged) and `meta` (JSON), so that each can be read alone. Variables are whole networks; with LoRA
its factors lie beside the unchanged kernels, and the reader folds them in.
"""

import contextlib
import json
import logging
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from vitcls.checkpoints import folders, seal
from vitcls.errors import NonFiniteLoss, StorageError, UserError
from vitcls.files import written_aside
from vitcls.folders import lock
from vitcls.processes import distributed
from vitcls.step import adapt

PyTree = Any
log = logging.getLogger("vitcls")
_ITEMS = ("params", "opt_state", "ema")

# Orbax warns at every save without a score, although most checkpoints are not evaluated. It also
# warns of a directory that is opened to be read only, which is what we ask for.
_EXPECTED = ("tracked_metric", "Given directory is read only")
logging.getLogger("absl").addFilter(
    lambda record: not any(text in record.getMessage() for text in _EXPECTED)
)


class Checkpoints:
    """The checkpoints below one directory: the newest few, and the best one.

    Each checkpoint is sealed (`vitcls.checkpoints.seal`) before it gets its name. It is compared
    with its seal before it is read. One process at a time may write.
    """

    def __init__(self, directory: Path, *, keep: int = 1, read_only: bool = False):
        """Opens the directory, and makes it unless it is only read.

        A writer takes the lock, removes what a killed run left half done, and renames damaged
        checkpoints to `STEP.corrupt-NUMBER`.

        Args:
          directory: Folder of the checkpoints.
          keep: Number of newest checkpoints to keep. The one with the highest score also stays.
          read_only: Whether nothing is written.

        Raises:
          UserError: the directory to read does not exist, or another process writes to it.
          StorageError: there are checkpoints, and all are damaged.
        """
        if read_only and not directory.is_dir():
            raise UserError(f"{directory} does not exist: no checkpoint has been saved there.")
        self._directory = directory.absolute()
        self._keep, self._read_only = keep, read_only
        # The step whose save has begun, until its end is known.
        self._saving: int | None = None
        self._failure: StorageError | None = None
        self._deletion: threading.Thread
        if not read_only:
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                lock.take(self._directory / "lock")
                folders.clear_away(self._directory)
                folders.set_damaged_aside(self._directory)
            distributed.wait_for_all("checkpoints are checked")
        self._manager = self._open()
        # Hashing takes seconds, so a step that was compared with its seal is not compared again.
        self._checked = set() if read_only else set(self.steps())

    def _open(self) -> ocp.CheckpointManager:
        policies = [
            checkpoint_managers.LatestN(self._keep),
            checkpoint_managers.BestN(
                get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # Without this function the scores never reach the disk.
            best_fn=_score,
            read_only=self._read_only,
            create=not self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            # A damaged score must not hide all the other checkpoints.
            lightweight_initialize=self._read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            # A checkpoint is renamed before it is deleted, so that half of one is never found.
            todelete_subdir=None if self._read_only else folders.DELETED,
        )
        # Without handlers a directory opened anew would know nothing of its items' contents.
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
        return ocp.CheckpointManager(
            self._directory,
            options=options,
            item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type, *_) -> None:
        # However a run ends, the save in flight is finished. Its failure must not hide an error.
        # After an error the other processes are not asked, because they may not be ending.
        try:
            if error_type is None:
                self.wait()
            else:
                self._finish_alone()
        finally:
            self._manager.close()
            if not self._read_only and jax.process_index() == 0:
                # A save that failed may have gone on writing.
                folders.clear_away(self._directory)
                lock.release(self._directory / "lock")

    def latest_step(self) -> int | None:
        step = self._manager.latest_step()
        if self._read_only or jax.process_count() == 1:
            return step
        return distributed.of_first(step or 0) or None

    def best_step(self) -> int | None:
        """The step with the highest score, the latest of equals; None if no score was saved."""
        scored = {}
        for step in self._manager.all_steps():
            with self._reading(step, part="metrics/"):
                if (metrics := self._manager.metrics(step)) is not None:
                    scored[step] = _score(metrics)
        return max(scored, key=lambda step: (scored[step], step), default=None)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, items: dict[str, PyTree], *, meta: dict[str, Any], score: float | None
    ) -> None:
        """Starts to save, and returns once the arrays are copied; a thread writes the files.

        A failure, here or in the save before, is logged and its files are removed. Training
        continues, and `wait` raises the failure unless a later save succeeds.

        Args:
          step: The step after which the items are saved.
          items: Name, one of `params`, `opt_state` and `ema`, -> tree of arrays.
          meta: A JSON value.
          score: Higher is better; None for a checkpoint that was not evaluated.

        Raises:
          NonFiniteLoss: parameters, or their averages, are not finite.
        """
        # Orbax would wait for the previous save here as well. Its size is known afterwards.
        self._finish()
        finite = _all_finite({name: items[name] for name in items if name != "opt_state"})
        if distributed.in_any_process(not finite):
            raise NonFiniteLoss(
                f"Parameters are not finite after step {step}: they are not saved. Start again in "
                "another --workdir with a lower optim.lr or a longer optim.warmup_steps."
            )
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}

        def start() -> None:
            self._check_room(items)
            self._manager.save(
                step,
                args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args),
                metrics=None if score is None else {"score": _finite(score)},
                force=True,
            )

        self._saving = step
        # A disk may spoil a file later, so each is compared again before it is read.
        self._checked.clear()
        if self._attempt(start):
            self._deletion = threading.Thread(target=self._delete_old)
            self._deletion.start()

    def add_score(self, step: int, score: float) -> None:
        """Adds the score to a checkpoint that was saved without one."""
        if jax.process_index() == 0:
            # Orbax keeps the score in this file.
            path = self._directory / str(step) / "metrics" / "metrics"
            path.parent.mkdir(exist_ok=True)
            with written_aside(path) as aside:
                aside.write_text(json.dumps({"score": _finite(score)}))
            seal.write(self._directory / str(step))
        distributed.wait_for_all(f"score of {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Returns once what was saved is on disk; raises `StorageError` if it could not be."""
        self._finish()
        if self._failure is not None:
            newest = self.latest_step()
            where = f"after step {newest}" if newest else "from the beginning"
            raise StorageError(
                f"{self._failure}. Fix that and run the same command again: it continues {where}."
            ) from self._failure

    def restore(self, step: int, items: dict[str, PyTree]) -> dict[str, PyTree]:
        """Returns the named items of `step`.

        Args:
          items: Name -> tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          UserError: a dtype differs; Orbax would cast it silently.
          StorageError: a file is missing or damaged.
        """
        with self._reading(step):
            saved = self._manager.item_metadata(step)
            for name, tree in items.items():
                _check_dtypes(f"{self._directory}/{step}/{name}", saved[name], tree)
            args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in items}

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` of a step, as it was saved."""
        with self._reading(step):
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["meta"]

    def item_names(self, step: int) -> set[str]:
        """Returns the names of the items that were saved at `step`."""
        with self._reading(step):
            items = self._manager.item_metadata(step).items()
        return {name for name, item in items if item is not None}

    def lora_shapes(self, step: int, item: str) -> dict[str, PyTree]:
        """Returns LoRA's factors among an item's variables, `jax.ShapeDtypeStruct`, if any."""
        with self._reading(step):
            saved = traverse_util.flatten_dict(self._manager.item_metadata(step)[item].tree)
        return traverse_util.unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                for path, leaf in saved.items()
                if path[-1] in adapt.LORA
            }
        )

    def _seal(self) -> None:
        """Seals a step in process 0, once all files are written and before it has its name."""
        # Orbax does not say where they are: in a temporary directory, or on a mounted bucket in the
        # final one.
        written = list(self._directory.glob(f"{self._saving}{folders.TEMPORARY}*"))
        seal.write(*written or [self._directory / str(self._saving)])

    def _finish(self) -> None:
        """Waits for the save in flight, if there is one, and notes whether it failed."""
        if self._saving is not None and self._attempt(self._manager.wait_until_finished):
            self._deletion.join()
            self._saving = self._failure = None

    def _finish_alone(self) -> None:
        """Does what `_finish` does without asking other processes; a failure is only logged."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            log.error(
                "The checkpoint of step %d in %s could not be saved: %s",
                self._saving, self._directory, error,
            )  # fmt: skip
        self._deletion.join()

    def _attempt(self, part: Callable[[], None]) -> bool:
        """Does a part of a save; returns whether it succeeded in all processes.

        A failure is logged, and its files are removed.
        """
        error = None
        # Orbax and TensorStore raise many types.
        try:
            part()
        except Exception as caught:
            error = caught
        if not distributed.in_any_process(error is not None):
            return True
        reason = str(error or "another process failed").strip() or type(error).__name__
        self._failure = StorageError(
            f"The checkpoint of step {self._saving} in {self._directory} could not be saved: "
            f"{reason.splitlines()[0][:300]}"
        )
        log.error("%s. Training continues, and the next save tries again.", self._failure)
        self._saving = None
        # Files that Orbax leaves would keep a full disk full. A manager that is not opened anew
        # would count steps that do not exist.
        with contextlib.suppress(Exception):
            self._manager.close()
        if jax.process_index() == 0:
            folders.clear_away(self._directory)
        distributed.wait_for_all("a failed save is cleared away")
        self._manager = self._open()
        return False

    def _check_room(self, items: dict[str, PyTree]) -> None:
        """Raises `OSError` if the disk has no room for 1.2 times the last checkpoint."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        if steps := self.steps():
            files = (self._directory / str(steps[-1])).rglob("*")
            needed = max(needed, sum(path.stat().st_size for path in files))
        free = shutil.disk_usage(self._directory).free
        if free < 1.2 * needed:
            raise OSError(f"it takes {1.2 * needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

    def _delete_old(self) -> None:
        """Deletes, in a thread, the checkpoints that the save in flight replaces."""
        # The main thread gets the same error.
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        if jax.process_index() == 0:
            shutil.rmtree(self._directory / folders.DELETED, ignore_errors=True)

    @contextlib.contextmanager
    def _reading(self, step: int, *, part: str = "") -> Iterator[None]:
        """Compares a checkpoint with its seal; errors of the reading inside then name it."""
        if step not in self._checked:
            what = None
            if self._read_only or jax.process_index() == 0:
                what = seal.damage(self._directory / str(step), part=part)
            if what or (not self._read_only and distributed.in_any_process(what is not None)):
                raise self._unreadable(step, what or "see the message of process 0")
            if not part:
                self._checked.add(step)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            raise self._unreadable(step, reason.splitlines()[0][:300]) from error

    def _unreadable(self, step: int, reason: str) -> StorageError:
        others = [other for other in self.steps() if other != step]
        return StorageError(
            f"The checkpoint of step {step} in {self._directory} could not be read: {reason}. "
            + (f"Others are there, of steps {others}." if others else "It was the only one.")
        )


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _all_finite(tree: PyTree) -> bool:
    """Whether all values are finite, of the arrays of which this process has the first copy."""
    # A program for all leaves together would take a second to compile, while the loop waits.
    copies = [copy for leaf in jax.tree.leaves(tree) for copy in _first_copies(leaf)]
    return all(jax.device_get([_is_finite(copy) for copy in copies]))


def _first_copies(leaf: jax.Array | np.ndarray) -> list[jax.Array | np.ndarray]:
    """The parts of an array that this process has, without those that another device has first."""
    if isinstance(leaf, np.ndarray):
        return [leaf]
    return [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]


def _score(metrics: dict[str, float]) -> float:
    return _finite(metrics["score"])


def _finite(score: float) -> float:
    # A diverged evaluation must not spoil the ranking: nan would compare as the best or not at all.
    return score if math.isfinite(score) else -sys.float_info.max


def _check_dtypes(where: str, saved: PyTree, wanted: PyTree) -> None:
    saved = _leaves_by_name(saved)
    for name, leaf in _leaves_by_name(wanted).items():
        if name not in saved:
            raise UserError(f"{where} has no {name}: it was saved by another network or optimizer.")
        if saved[name].dtype != leaf.dtype:
            raise UserError(f"{where}/{name} is {saved[name].dtype}, but {leaf.dtype} is wanted.")


def _leaves_by_name(tree: PyTree) -> dict[str, Any]:
    # Names are compared, not paths: metadata has dicts where an optimizer's state has named tuples.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
