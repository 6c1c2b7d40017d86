"""One checkpoint that might be fine-tuned: how good its features are, and what it costs.

N held-out images, S seeds of the linear probe.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vitcls.probe import fitting
from vitcls.probe.features import Backbone, Features, compile_forward
from vitcls.step import sharding

# The fastest window counts: other work on the machine can only slow one down.
_WINDOWS = 5
_WINDOW_SECS = 0.2


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one image.

    Attributes:
      image_size: (height, width) that the network sees.
      num_params: Parameters of the network without its head.
      gflops: 1e9 operations of one forward pass; a multiply-add counts as two. Infinite if the
        compiler does not say.
      images_per_second: Speed of the forward pass on all devices, without decoding.
      batch_size: Batch size at that speed.
    """

    image_size: tuple[int, int]
    num_params: int
    gflops: float
    images_per_second: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The measurements of one checkpoint.

    Attributes:
      name: As the user wrote it.
      probe: Number of seeds whose linear probe is right, for each held-out image, int (N,).
      num_seeds: S.
      knn: 1 where nearest neighbours are right, else 0, int (N,).
      chosen: The selected hyper-parameters of both heads, by name.
      costs: Its costs.
    """

    name: str
    probe: np.ndarray
    num_seeds: int
    knn: np.ndarray
    chosen: dict[str, float]
    costs: Costs


def fit_heads(
    name: str, parts: dict[str, Features], costs: Costs, *, num_classes: int, num_epochs: int
) -> Candidate:
    """Fits both heads on "train", tunes them on "validation", evaluates them on "test".

    Args:
      name: The checkpoint, as the user wrote it.
      parts: Its features, by split.
      costs: Its costs.
      num_classes: Classes of the data.
      num_epochs: Epochs of the linear probe.
    """
    knn = fitting.neighbours(parts, num_classes=num_classes)
    _, scaled = fitting.standardise(parts)
    probe = fitting.linear_probe(scaled, num_classes=num_classes, num_epochs=num_epochs)
    return Candidate(
        name,
        probe=probe.test_hits.sum(axis=0),
        num_seeds=len(probe.test_hits),
        knn=knn.test_hits[0].astype(np.int64),
        chosen=knn.chosen | probe.chosen,
        costs=costs,
    )


def measure_costs(backbone: Backbone, *, num_images: int, batch_size: int = 0) -> Costs:
    """Counts the operations of one image and measures the speed.

    Args:
      backbone: The network.
      num_images: Images to process; batches are not larger than these need.
      batch_size: See `features.compile_forward`.
    """
    step, batch_size = compile_forward(backbone, num_images=num_images, batch_size=batch_size)
    return Costs(
        image_size=backbone.processor.size,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(backbone.variables["params"])),
        gflops=count_gflops(backbone),
        images_per_second=_speed(backbone, step, batch_size),
        batch_size=batch_size,
    )


def count_gflops(backbone: Backbone) -> float:
    """Counts on the program before optimisation, where it is the same on every device."""
    image = jax.ShapeDtypeStruct((1, *backbone.processor.size, 3), np.uint8)
    lowered = backbone.forward.lower(backbone.variables, image)
    return (lowered.cost_analysis() or {}).get("flops", math.inf) / 1e9


def _speed(
    backbone: Backbone, step: Callable[[Any, jax.Array], jax.Array], batch_size: int
) -> float:
    blank = np.zeros((batch_size, *backbone.processor.size, 3), np.uint8)
    images = sharding.to_global({"image": blank}, backbone.mesh)["image"]
    jax.block_until_ready(step(backbone.variables, images))  # the first one is slower
    rates = []
    for _ in range(_WINDOWS):
        start, num = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < _WINDOW_SECS or not num:
            jax.block_until_ready(step(backbone.variables, images))
            num += batch_size
        rates.append(num / seconds)
    return max(rates)
