"""Runs a checkpoint on all devices of this process, in batches that fit into their memory.

B batch, H W pixels, K classes.
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from vitcls import pretrained
from vitcls.costs import footprint
from vitcls.errors import NotFinite, UserError
from vitcls.logs import parameters, progress
from vitcls.processes.devices import start_devices
from vitcls.step import sharding

PyTree = Any
log = logging.getLogger("vitcls")

# Threads that decode. Files on a network need more of them than there are CPUs.
NUM_THREADS = max(8, os.cpu_count() or 1)
# Images per device and step. More are hardly faster, and the first results would come later.
_MAX_IMAGES_ON_CPU, _MAX_IMAGES = 32, 256
_MAX_NAMED = 5  # images in a message


def load_classifier(
    checkpoint: str | Path,
) -> tuple[nn.Module, PyTree, pretrained.Processor, Mesh]:
    """Loads a checkpoint, as `pretrained.load` takes it, onto every device of a new mesh.

    Raises:
      UserError: The checkpoint cannot be read, or it has no classes.
    """
    model, variables, processor = pretrained.load(checkpoint)
    check_has_head(checkpoint, processor)
    mesh = sharding.make_mesh(-1, 1, devices=start_devices())
    return model, jax.device_put(variables, sharding.replicated(mesh)), processor, mesh


def check_has_head(checkpoint: str | Path, processor: pretrained.Processor) -> None:
    """Raises `UserError` if a checkpoint has no classes; the message suits every command."""
    if not processor.class_names:
        raise UserError(
            f"The checkpoint {checkpoint} has no head, so it has no classes. Fine-tune it first: "
            f"python -m vitcls.main --config=... --config.model.pretrained={checkpoint}"
        )


def check_answers(
    answers: np.ndarray, image_id: Callable[[int], str], *, error: type[Exception] = NotFinite
) -> None:
    """Raises `error` if an output of a network is not finite; names the images.

    Args:
      answers: Logits, probabilities or features, float32 (N, ...).
      image_id: Names the image of a row.
      error: `NotFinite` for a checkpoint that the user chose; training raises `NonFiniteLoss`.
    """
    of_an_image = tuple(range(1, answers.ndim))
    rows = np.flatnonzero(~np.isfinite(answers).all(axis=of_an_image))
    if rows.size:
        named = ", ".join(image_id(int(row)) for row in rows[:_MAX_NAMED])
        more = ", ..." if len(rows) > _MAX_NAMED else ""
        raise error(
            f"The network's answers to {len(rows)} of {len(answers)} images are not finite: "
            f"{named}{more}. Its weights are finite but overflow, so its results mean nothing. "
            "Train again with a lower optim.lr, or choose another checkpoint."
        )


def compile_step(
    step: Callable[[PyTree, PyTree], Any],
    variables: PyTree,
    row: PyTree,
    *,
    mesh: Mesh,
    num_images: int,
    batch_size: int = 0,
) -> tuple[Callable[[PyTree, PyTree], Any], int]:
    """Compiles `(variables, batch) -> ...` once, for one batch size.

    Args:
      step: A jitted function.
      variables: Its first argument, on the devices of `mesh`.
      row: Shapes and dtypes of one image in a batch.
      mesh: The devices.
      num_images: Number of images in all batches together.
      batch_size: B, rounded up to a multiple of the devices; 0: the largest useful B that fits.

    Returns:
      The compiled step, for batches that are sharded over all devices, and B.
    """

    @functools.cache
    def compiled(size: int) -> jax.stages.Compiled:
        split = sharding.batch_sharding(mesh)
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (size * mesh.size, *leaf.shape), leaf.dtype, sharding=split
            ),
            row,
        )
        with progress.doing(f"Compiling for {size * mesh.size} images"):
            return step.lower(variables, batch).compile()

    def bytes_needed(size: int) -> float:
        """Memory on each device, without the variables."""
        try:
            memory = compiled(size).memory_analysis()
        # The compiler for TPUs refuses programs that do not fit.
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        arguments = memory.argument_size_in_bytes - parameters.bytes_per_device(variables)
        return arguments + memory.temp_size_in_bytes + memory.output_size_in_bytes

    if batch_size:
        size = math.ceil(batch_size / mesh.size)
    else:
        per_device = math.ceil(num_images / mesh.size)
        max_size = _MAX_IMAGES_ON_CPU if footprint.on_cpu(mesh) else _MAX_IMAGES
        # Batches are equal, since a last batch with few images would cost as much as the others.
        max_size = math.ceil(per_device / math.ceil(per_device / max_size))
        size = fitting_size(max_size, bytes_needed, available=footprint.available_bytes(mesh))
        log.info("Batches of %d images.", size * mesh.size)
    return compiled(size), size * mesh.size


def fitting_size(max_size: int, bytes_needed: Callable[[int], float], *, available: float) -> int:
    """Halves `max_size` until it needs at most `footprint.SHARE` of `available`, or it is 1."""
    size = max_size
    while size > 1 and bytes_needed(size) > footprint.SHARE * available:
        size //= 2
    return size
