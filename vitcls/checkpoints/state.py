"""The training state as what is saved and restored."""

from typing import Any

import jax
import numpy as np

from vitcls.checkpoints.manager import Checkpoints
from vitcls.checkpoints.saved import Saved
from vitcls.step import adapt, sharding
from vitcls.step.train_step import TrainState, fold_lora


def state_items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint, whole networks to be read without this run; `meta` has counts."""
    items = {"params": state.variables(), "opt_state": state.opt_state}
    return items | ({} if state.ema is None else {"ema": state.averages()})


def restore_state(checkpoints: Checkpoints, step: int, target: TrainState) -> TrainState:
    """Returns the state after `step`, bit for bit as it was saved; it has no teacher.

    Args:
      checkpoints: The run's.
      step: A step that was saved.
      target: `jax.ShapeDtypeStruct` with shardings, in place of arrays.
    """
    items = checkpoints.restore(step, state_items(target))

    # A checkpoint has whole networks. `target` says which part of them is trained.
    def trained(variables):
        return {
            "params": adapt.subtree(variables["params"], target.params),
            "batch_stats": variables.get("batch_stats", {}),
        }

    saved = Saved.from_json(checkpoints.meta(step))
    return TrainState(
        step=sharding.put(np.int32(step), target.step.sharding),
        frozen=adapt.subtree(items["params"]["params"], target.frozen),
        opt_state=items["opt_state"],
        ema=None if target.ema is None else trained(items["ema"]),
        skips={
            name: sharding.put(np.int32(saved.skips[name]), shape.sharding)
            for name, shape in target.skips.items()
        },
        num_empty=sharding.put(np.int32(saved.num_empty), target.num_empty.sharding),
        **trained(items["params"]),
    )


def eval_variables_at(checkpoints: Checkpoints, step: int, state: TrainState) -> Any:
    """Returns the variables to evaluate as they were after `step`, placed like `state`'s."""
    if step == int(state.step):
        return state.eval_variables()
    name = "params" if state.ema is None else "ema"
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state.averages(),
    )
    return fold_lora(checkpoints.restore(step, {name: target})[name])
