"""Pooled features of a split by any checkpoint, computed once and cached in a folder.

N examples, D features.
"""

import dataclasses
import functools
import hashlib
import logging
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vitcls import inference, pretrained
from vitcls.data import cache, loader
from vitcls.data.sources.split import Split
from vitcls.files import written_aside
from vitcls.logs import progress
from vitcls.processes.devices import start_devices
from vitcls.step import sharding

log = logging.getLogger("vitcls")


class Features(NamedTuple):
    """Features of the examples of a split, in its order."""

    features: np.ndarray  # float32 (N, D)
    labels: np.ndarray  # int32 (N,)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network without its head, on all devices."""

    model: nn.Module
    variables: Any
    processor: pretrained.Processor
    mesh: Mesh

    @functools.cached_property
    def forward(self) -> jax.stages.Wrapped:
        """`(variables, uint8 (B, H, W, 3)) -> float32 (B, D)`, on every device.

        Jitted once, so that a second split with the same batch size compiles nothing.
        """
        # The closure must not hold `self`, which would keep the variables in memory.
        model, processor = self.model, self.processor
        return jax.jit(
            lambda variables, images: model.apply(
                variables, processor.normalise(images), train=False
            ),
            out_shardings=sharding.replicated(self.mesh),
        )

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the network, its weights and its preprocessing."""
        prepared = dataclasses.replace(self.processor, id2label={})
        digest = hashlib.sha256(f"{self.model} {prepared}".encode())
        for name, leaf in sorted(flatten_dict(self.variables, sep="/").items()):
            digest.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
            digest.update(np.ascontiguousarray(leaf))
        return digest.hexdigest()


def load_backbone(checkpoint: str | Path) -> Backbone:
    """Loads a checkpoint, as `pretrained.load` takes it, without its head.

    Raises:
      UserError: The checkpoint cannot be read.
    """
    model, variables, processor = pretrained.load(checkpoint, num_classes=0)
    mesh = sharding.make_mesh(-1, 1, devices=start_devices())
    return Backbone(model, jax.device_put(variables, sharding.replicated(mesh)), processor, mesh)


def features_of(backbone: Backbone, split: Split, *, folder: Path, batch_size: int = 0) -> Features:
    """Returns the features of all examples, read from `folder` or computed and written there.

    Args:
      backbone: The network.
      split: The examples.
      folder: Holds files of features, each named after a hash of the network and the images.
      batch_size: See `inference.compile_step`.

    Raises:
      UserError: An image cannot be decoded, or its features are not finite (`NotFinite`).
    """
    images, _ = cache.sample(split)
    key = hashlib.sha256(f"{backbone.digest} {images}".encode()).hexdigest()
    path = folder / f"{key[:32]}.npz"
    try:
        with np.load(path) as file:
            found = Features(file["features"], file["labels"])
        inference.check_answers(found.features, split.id)
        return found
    except FileNotFoundError:
        pass
    except (EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s) and is computed again.", path, error)
    found = extract(backbone, split, batch_size=batch_size)
    inference.check_answers(found.features, split.id)
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **found._asdict())
    return found


def extract(backbone: Backbone, split: Split, *, batch_size: int = 0) -> Features:
    """Computes the features of every example once. Args and Raises: as for `features_of`."""
    processor, mesh = backbone.processor, backbone.mesh
    start = time.monotonic()
    step, batch_size = compile_forward(backbone, num_images=len(split), batch_size=batch_size)
    batches = loader.eval_batches(
        split,
        global_batch_size=batch_size,
        transform=processor.pixels,
        num_threads=inference.NUM_THREADS,
    )
    features, labels = [], []
    for batch in progress.track(batches, f"Features of {split.name}"):
        images = sharding.to_global({"image": batch["image"]}, mesh)["image"]
        is_used = batch["index"] >= 0  # not the padding of the last batch
        features.append(np.asarray(step(backbone.variables, images))[is_used])
        labels.append(batch["targets"][is_used].argmax(axis=-1).astype(np.int32))
    found = Features(np.concatenate(features), np.concatenate(labels))
    assert len(found.features) == len(split), (split.name, len(found.features), len(split))
    log.info(
        "Features of %d images of split %r: %s.",
        len(split), split.name, progress.duration(time.monotonic() - start),
    )  # fmt: skip
    return found


def compile_forward(
    backbone: Backbone, *, num_images: int, batch_size: int = 0
) -> tuple[Callable[[Any, jax.Array], jax.Array], int]:
    """Compiles `backbone.forward` for one batch size; see `inference.compile_step`."""
    return inference.compile_step(
        backbone.forward,
        backbone.variables,
        jax.ShapeDtypeStruct((*backbone.processor.size, 3), np.uint8),
        mesh=backbone.mesh,
        num_images=num_images,
        batch_size=batch_size,
    )
