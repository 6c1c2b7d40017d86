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

from vitcls.probe import features as features_lib
from vitcls.probe import fitting
from vitcls.probe.features import Backbone, Features
from vitcls.step import sharding

_WINDOWS = 5  # the fastest is the speed: other work can only slow them down
_WINDOW_SECS = 0.2


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one image costs.

    Attributes:
      image_size: (height, width) that the network sees.
      num_params: Of the network without its head.
      gflops: 1e9 operations for one image, forwards, a multiply-add being two; infinite
        where the compiler does not say.
      images_per_second: Forwards, decoded images in, on all devices.
      batch_size: Images at a time then.
    """

    image_size: tuple[int, int]
    num_params: int
    gflops: float
    images_per_second: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is known of a checkpoint.

    Attributes:
      name: As the user wrote it.
      probe: For how many seeds the linear probe is right, of each held-out image, int (N,).
      num_seeds: S.
      knn: Whether nearest neighbours are right, int (N,).
      chosen: The hyper-parameters of both, by name.
      costs: What it costs.
    """

    name: str
    probe: np.ndarray
    num_seeds: int
    knn: np.ndarray
    chosen: dict[str, float]
    costs: Costs


def fit(
    name: str, parts: dict[str, Features], costs: Costs, *, num_classes: int, num_epochs: int
) -> Candidate:
    """Fits both heads on "train", chooses them on "validation" and asks them of "test".

    Args:
      name: Of the checkpoint.
      parts: Its features.
      costs: What it costs.
      num_classes: Of the data.
      num_epochs: Of the linear probe.
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


def costs_of(backbone: Backbone, *, num_images: int, batch_size: int = 0) -> Costs:
    """Counts and measures what an image costs.

    Args:
      backbone: The network.
      num_images: How many there are to see: batches are no larger than is of use for them.
      batch_size: See `features.compile_forward`.
    """
    step, batch_size = features_lib.compile_forward(
        backbone, num_images=num_images, batch_size=batch_size
    )
    return Costs(
        image_size=backbone.processor.size,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(backbone.variables["params"])),
        gflops=gflops(backbone),
        images_per_second=_speed(backbone, step, batch_size),
        batch_size=batch_size,
    )


def gflops(backbone: Backbone) -> float:
    """Counts on the program before it is optimised, where it is the same for every device."""
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
