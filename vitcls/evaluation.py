"""One exact pass over a split: every example counts once, on any number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vitcls import metrics, progress, sharding
from vitcls.errors import Interrupted
from vitcls.signals import StopRequest

Batch = dict[str, np.ndarray]


def evaluate(
    eval_step: Callable[[Any, Batch], tuple[dict[str, jax.Array], dict[str, jax.Array]]],
    variables: Any,
    batches: Iterable[Batch],
    *,
    mesh: Mesh,
    name: str,
    num_examples: int,
    keep_predictions: bool = False,
    stop: StopRequest | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluates `variables` on all of `batches`.

    Args:
      eval_step: `train_step.make_eval_step`'s result, compiled to return the same to every process.
      variables: The network's variables, on the devices of `mesh`.
      batches: This process' local batches in the split's order; padding has mask 0 and index -1,
        images that are skipped have mask 0 and their index.
      name: The split's name, for the progress bar.
      num_examples: Size of the split.
      keep_predictions: Whether to return what the network said of each example.
      stop: Ends the pass with `Interrupted` when a signal came.

    Returns:
      The metrics of `metrics.summarise`, of the N images that could be used, and `num_skipped`, of
      those that could not; and, if kept, `labels` int32 (N,), `logits` float32 (N, K) and `index`
      int32 (N,), which of the split they are, in its order.
    """
    total, kept = None, []
    for batch in progress.track(batches, name):
        if stop is not None and stop.name:
            raise Interrupted(f"{stop.name}: evaluation of {name} stopped; run the command again.")
        sums, predictions = eval_step(variables, sharding.to_global(batch, mesh))
        total = metrics.add_sums(total, jax.device_get(sums))
        if keep_predictions:
            kept.append(jax.device_get(predictions))
    # Loader and devices disagree only through a bug, which would make the numbers wrong in silence.
    assert total["num_seen"] == num_examples, (name, total["num_seen"], num_examples)
    num_used = int(total["num_examples"])
    summary = metrics.summarise(total) | {"num_skipped": num_examples - num_used}
    if not keep_predictions:
        return summary, {}
    # Rows of a global batch are in the split's order.
    arrays = {field: np.concatenate([batch[field] for batch in kept]) for field in kept[0]}
    is_used = arrays["index"] >= 0
    assert np.unique(arrays["index"][is_used]).size == num_used, name
    return summary, {field: array[is_used] for field, array in arrays.items()}
