"""Pooled features of a split by any checkpoint, computed once and cached in a folder.

While a split is computed, shards of its features are written, so that an interrupted call resumes.

N examples, D features.
"""

import dataclasses
import functools
import hashlib
import logging
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vitcls import inference, pretrained
from vitcls.data import cache, loader
from vitcls.data.sources.split import Split, Subset
from vitcls.errors import NotFinite
from vitcls.files import written_aside
from vitcls.logs import progress
from vitcls.processes.devices import start_devices
from vitcls.step import sharding

log = logging.getLogger("vitcls")

# A shard is written after so many seconds: an interruption costs no more work than that.
SHARD_SECS = 20.0
_UNFINISHED = ".unfinished"  # suffix of a folder of shards
_DAMAGES = (EOFError, ValueError, KeyError, zipfile.BadZipFile)


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
        Shards of an interrupted call are read from it, and only the rest is computed.
      batch_size: See `inference.compile_step`.

    Raises:
      UserError: An image cannot be decoded, or its features are not finite (`NotFinite`).
    """
    images, _ = cache.sample(split)
    key = hashlib.sha256(f"{backbone.digest} {images}".encode()).hexdigest()
    path = folder / f"{key[:32]}.npz"
    try:
        found = _read(path)
        inference.check_answers(found.features, split.id)
        return found
    except FileNotFoundError:
        pass
    except _DAMAGES as error:
        log.warning("%s is damaged (%s) and is computed again.", path, error)
    found = extract(backbone, split, batch_size=batch_size, unfinished=path.with_suffix(""))
    try:
        inference.check_answers(found.features, split.id)
    except NotFinite:
        _remove_shards(path)
        raise
    _write(path, found)
    _remove_shards(path)
    return found


def extract(
    backbone: Backbone, split: Split, *, batch_size: int = 0, unfinished: Path | None = None
) -> Features:
    """Computes the features of every example once.

    Args:
      backbone: The network.
      split: The examples.
      batch_size: See `inference.compile_step`.
      unfinished: Beginning of the path of a folder of shards, which are read and written; None: no
        shards.

    Raises:
      UserError: An image cannot be decoded.
    """
    start = time.monotonic()
    step, batch_size = compile_forward(backbone, num_images=len(split), batch_size=batch_size)
    folder = unfinished and _shard_folder(unfinished, backbone.mesh, batch_size)
    parts = _read_shards(folder) if folder else []
    num_done = num_written = sum(len(part.labels) for part in parts)
    if num_done:
        log.info(
            "Features of split %r: %d of %d images are in %s; the others are computed.",
            split.name, num_done, len(split), folder,
        )  # fmt: skip
    # The shards end with a batch, so that all batches are those of an uninterrupted call.
    rest = Subset(split.name, split, indices=np.arange(num_done, len(split))) if num_done else split
    pending, last_write = [], time.monotonic()
    for part in _computed(backbone, rest, step, batch_size) if len(rest) else ():
        pending.append(part)
        num_done += len(part.labels)
        if folder and num_done < len(split) and time.monotonic() - last_write >= SHARD_SECS:
            parts.append(_joined(pending))
            _write(folder / _shard_name(num_written), parts[-1])
            pending, num_written, last_write = [], num_done, time.monotonic()
    found = _joined([*parts, *pending])
    assert len(found.features) == len(split), (split.name, len(found.features), len(split))
    log.info(
        "Features of %d images of split %r: %s.",
        len(split), split.name, progress.duration(time.monotonic() - start),
    )  # fmt: skip
    return found


def _computed(
    backbone: Backbone,
    split: Split,
    step: Callable[[Any, jax.Array], jax.Array],
    batch_size: int,
) -> Iterator[Features]:
    """Yields the features of each batch."""
    batches = loader.eval_batches(
        split,
        global_batch_size=batch_size,
        transform=backbone.processor.pixels,
        num_threads=inference.NUM_THREADS,
    )
    for batch in progress.track(batches, f"Features of {split.name}"):
        images = sharding.to_global({"image": batch["image"]}, backbone.mesh)["image"]
        is_used = batch["index"] >= 0  # not the padding of the last batch
        labels = batch["targets"][is_used].argmax(axis=-1).astype(np.int32)
        yield Features(np.asarray(step(backbone.variables, images))[is_used], labels)


def _joined(parts: list[Features]) -> Features:
    return Features(*map(np.concatenate, zip(*parts, strict=True)))


def _read(path: Path) -> Features:
    with np.load(path) as file:
        return Features(file["features"], file["labels"])


def _write(path: Path, found: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **found._asdict())


def _shard_folder(unfinished: Path, mesh: Mesh, batch_size: int) -> Path:
    """Returns the folder of shards that these devices can continue bit for bit."""
    # Another batch size or device may round differently.
    facts = f"{batch_size} {mesh.size} {mesh.devices.flat[0].device_kind} {jax.__version__}"
    digest = hashlib.sha256(facts.encode()).hexdigest()
    folder = unfinished.with_name(f"{unfinished.name}-{digest[:8]}{_UNFINISHED}")
    for other in sorted(unfinished.parent.glob(f"*{_UNFINISHED}")):
        if other != folder:
            log.info(
                "%s is not used here: it has features of another checkpoint, other images or "
                "another batch size.", other,
            )  # fmt: skip
    return folder


def _shard_name(num_before: int) -> str:
    """The file name of the shard that follows `num_before` examples."""
    return f"{num_before:09}.npz"


def _read_shards(folder: Path) -> list[Features]:
    """Reads the shards from the first example on, up to the first that is missing or damaged."""
    parts, num = [], 0
    while (path := folder / _shard_name(num)).exists():
        try:
            parts.append(_read(path))
        except _DAMAGES as error:
            log.warning("%s is damaged (%s) and is computed again.", path, error)
            break
        num += len(parts[-1].labels)
    return parts


def _remove_shards(path: Path) -> None:
    """Removes the shards of a finished file, of any batch size."""
    for folder in path.parent.glob(f"{path.stem}-*{_UNFINISHED}"):
        shutil.rmtree(folder, ignore_errors=True)


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
