"""Exact evaluation of a split: every example counts once, on any number of devices.

B batch, N images, K classes.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vitcls import inference, pretrained
from vitcls.data import loader
from vitcls.data.skipped import Skipped
from vitcls.data.sources import classes
from vitcls.data.sources.split import Split
from vitcls.evaluate.summary import summarise
from vitcls.logs import progress
from vitcls.step import metrics, sharding
from vitcls.step.eval_step import make_eval_step, over_mirror_images

Batch = dict[str, np.ndarray]


def evaluate(
    eval_step: Callable[[Any, Batch], tuple[dict[str, jax.Array], dict[str, jax.Array]]],
    variables: Any,
    batches: Iterable[Batch],
    *,
    mesh: Mesh,
    name: str,
    num_examples: int,
    train_counts: np.ndarray | None = None,
    keep_predictions: bool = False,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluates `variables` on all of `batches`.

    Args:
      eval_step: From `eval_step.make_eval_step`, compiled to return the same to every process.
      variables: The network's variables, on the devices of `mesh`.
      batches: Local batches of this process in the split's order. Padding has mask 0 and index -1;
        skipped images have mask 0 and their index.
      name: The split's name, for the progress bar.
      num_examples: Size of the split.
      train_counts: See `summary.summarise`.
      keep_predictions: Whether to return the logits of each example.
      after_batch: Called after each batch; it may end the pass by raising.

    Returns:
      The metrics of `summary.summarise` for the N images that were used, with `num_skipped`, the
      number of the others. If predictions are kept, also `labels` int32 (N,), `logits` float32
      (N, K) and `index` int32 (N,), the positions in the split, ascending.
    """
    total, kept = None, []
    for batch in progress.track(batches, name):
        sums, predictions = eval_step(variables, sharding.to_global(batch, mesh))
        total = metrics.add_sums(total, jax.device_get(sums))
        if keep_predictions:
            kept.append(jax.device_get(predictions))
        after_batch()
    # Loader and devices disagree only through a bug, which would silently give wrong numbers.
    assert total["num_seen"] == num_examples, (name, total["num_seen"], num_examples)
    num_used = int(total["num_examples"])
    summary = summarise(total, train_counts=train_counts)
    summary["num_skipped"] = num_examples - num_used
    if not keep_predictions:
        return summary, {}
    # Rows of a global batch are in the split's order.
    arrays = {field: np.concatenate([batch[field] for batch in kept]) for field in kept[0]}
    is_used = arrays["index"] >= 0
    assert np.unique(arrays["index"][is_used]).size == num_used, name
    return summary, {field: array[is_used] for field, array in arrays.items()}


def evaluate_checkpoint(
    checkpoint: str | Path, split: Split, **options: Any
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluates any checkpoint on any split, over the K classes of the checkpoint.

    Args:
      checkpoint: As `pretrained.load` takes it.
      split: The examples.
      **options: See `make_evaluator`.

    Returns:
      The metrics and the predictions of `evaluate`; labels count the checkpoint's classes.

    Raises:
      UserError: The checkpoint is missing or has no classes, its classes do not match those of the
        split, or logits are not finite.
    """
    model, variables, processor, mesh = inference.load_classifier(checkpoint)
    return make_evaluator(model, variables, processor, split, mesh=mesh, **options)(variables)


def make_evaluator(
    model: nn.Module,
    variables: Any,
    processor: pretrained.Processor,
    split: Split,
    *,
    mesh: Mesh,
    labels: str = "name",
    batch_size: int = 0,
    tta: str = "none",
    skipped: Skipped | None = None,
) -> Callable[[Any], tuple[dict[str, float], dict[str, np.ndarray]]]:
    """Compiles the evaluation of one network on a split, for any number of weights.

    Args:
      model: The network.
      variables: Its weights, or others of the same shapes, on the devices of `mesh`.
      processor: Prepares its images and names its K classes.
      split: The examples.
      mesh: The devices.
      labels: How the split's classes are found among the checkpoint's, see `classes.match`.
      batch_size: See `inference.compile_step`.
      tta: "flip": see `eval_step.over_mirror_images`; or "none".
      skipped: See `loader.eval_batches`.

    Returns:
      A function of variables, on the host or on devices. It returns the metrics and the predictions
      of `evaluate`, whose labels count the network's classes. It raises `NotFinite` if logits are
      not finite.

    Raises:
      UserError: The classes do not match.
    """
    positions = classes.match(split.class_names, processor.class_names, by=labels)
    apply = over_mirror_images(model.apply) if tta == "flip" else model.apply
    eval_step = make_eval_step(processor.normalise, apply)

    def step(variables, batch):
        targets = jnp.zeros((len(batch["targets"]), len(processor.class_names)))
        targets = targets.at[:, positions].set(batch["targets"])
        return eval_step(variables, batch | {"targets": targets})

    row = {
        "image": jax.ShapeDtypeStruct((*processor.size, 3), np.uint8),
        "targets": jax.ShapeDtypeStruct((len(positions),), np.float32),
        "mask": jax.ShapeDtypeStruct((), np.float32),
        "index": jax.ShapeDtypeStruct((), np.int32),
    }
    compiled, batch_size = inference.compile_step(
        jax.jit(step, out_shardings=sharding.replicated(mesh)),
        variables,
        row,
        mesh=mesh,
        num_images=len(split),
        batch_size=batch_size,
    )
    batches = loader.eval_batches(
        split,
        global_batch_size=batch_size,
        transform=processor.pixels,
        num_threads=inference.NUM_THREADS,
        skipped=skipped,
    )

    def evaluate_variables(variables):
        summary, predictions = evaluate(
            compiled, jax.device_put(variables, sharding.replicated(mesh)), batches,
            mesh=mesh, name=split.name, num_examples=len(split), keep_predictions=True,
        )  # fmt: skip
        check_logits(predictions, split)
        return summary, predictions

    return evaluate_variables


def check_logits(predictions: dict[str, np.ndarray], split: Split, **options: Any) -> None:
    """`inference.check_answers` for predictions that `evaluate` kept."""
    index = predictions["index"]
    inference.check_answers(predictions["logits"], lambda row: split.id(int(index[row])), **options)
