"""One exact pass over a split: every example counts once, on any number of devices.

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
      eval_step: `train_step.make_eval_step`'s result, compiled to return the same to every process.
      variables: The network's variables, on the devices of `mesh`.
      batches: This process' local batches in the split's order; padding has mask 0 and index -1,
        images that are skipped have mask 0 and their index.
      name: The split's name, for the progress bar.
      num_examples: Size of the split.
      train_counts: See `metrics.summarise`.
      keep_predictions: Whether to return what the network said of each example.
      after_batch: Called after each batch; may end the pass by raising.

    Returns:
      The metrics of `metrics.summarise`, of the N images that could be used, and `num_skipped`, of
      those that could not; and, if kept, `labels` int32 (N,), `logits` float32 (N, K) and `index`
      int32 (N,), which of the split they are, in its order.
    """
    total, kept = None, []
    for batch in progress.track(batches, name):
        sums, predictions = eval_step(variables, sharding.to_global(batch, mesh))
        total = metrics.add_sums(total, jax.device_get(sums))
        if keep_predictions:
            kept.append(jax.device_get(predictions))
        after_batch()
    # Loader and devices disagree only through a bug, which would make the numbers wrong in silence.
    assert total["num_seen"] == num_examples, (name, total["num_seen"], num_examples)
    num_used = int(total["num_examples"])
    summary = metrics.summarise(total, train_counts=train_counts)
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
      What `evaluate` returns of everything, with the checkpoint's labels.

    Raises:
      UserError: no such checkpoint, one without classes, classes that do not match, or logits that
        are not finite.
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
    """Compiles once what evaluates any number of weights of one network on a split.

    Args:
      model: The network.
      variables: Its weights, or others of the same shapes, on the devices of `mesh`.
      processor: How its images are prepared; it names the K classes.
      split: The examples.
      mesh: The devices.
      labels: How the split's classes are found among the checkpoint's, see `classes.match`.
      batch_size: Images at a time over all devices; 0: chosen by their memory.
      tta: "flip": see `train_step.over_mirror_images`; or "none".
      skipped: As for `loader.eval_batches`.

    Returns:
      `variables -> ` what `evaluate` returns of everything, with the network's labels. It takes
      them from the host, too.

    Raises:
      UserError: the classes do not match. What is returned raises `NotFinite` where logits are not.
    """
    names = processor.class_names
    positions = classes.match(split.class_names, names, by=labels)
    apply = over_mirror_images(model.apply) if tta == "flip" else model.apply
    eval_step = make_eval_step(processor.normalise, apply)

    def step(variables, batch):
        targets = jnp.zeros((len(batch["targets"]), len(names)))
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
    """`inference.check_answers` for the predictions that `evaluate` kept of a split."""
    index = predictions["index"]
    inference.check_answers(predictions["logits"], lambda row: split.id(int(index[row])), **options)
