"""Cheap heads on a checkpoint's features, with hyper-parameters chosen on held-out examples.

N examples, D features, K classes.
"""

import dataclasses
import itertools
import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls import pretrained
from vitcls.costs import footprint
from vitcls.data.sources.split import Split
from vitcls.errors import UserError
from vitcls.files import write_json
from vitcls.logs.progress import doing
from vitcls.models.vit_config import HEADS
from vitcls.pretrained.saving import config_to_json
from vitcls.probe import heads
from vitcls.probe.features import Backbone, Features, features_of, load_backbone
from vitcls.provenance import manifest
from vitcls.step import sharding

log = logging.getLogger("vitcls")

NUM_NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
# For standardised features. The loss is a sum over examples, so few examples need less than many.
REGULARISERS = tuple(2.0**power for power in range(-10, 21, 2))
LRS = tuple(base * 10.0**power for power in range(-4, 1) for base in (1, 3))
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
NUM_SEEDS = 5
BATCH_SIZE = 256  # largest batch of the linear probe
_SHARE = 0.5  # share of the free memory for trials that are trained together


class Result(NamedTuple):
    """The choice of one method, with its accuracy.

    Attributes:
      method: "knn", "ridge" or "probe".
      chosen: Hyper-parameters by name.
      validation_accuracy: The mean over seeds, if the method has seeds.
      test_hits: Which test examples are right, bool (S, N), with one row per seed.
      head: The linear head for raw features that is best on the held-out part; None for "knn".
      test_accuracy_of_head: Test accuracy of `head`.
    """

    method: str
    chosen: dict[str, Any]
    validation_accuracy: float
    test_hits: np.ndarray
    head: heads.Linear | None = None
    test_accuracy_of_head: float | None = None

    @property
    def test_accuracies(self) -> list[float]:
        """One per seed."""
        return self.test_hits.mean(axis=1).tolist()


def probe(
    checkpoint: str,
    parts: dict[str, Split],
    output: Path,
    *,
    num_epochs: int,
    batch_size: int = 0,
    trained_on: int | None = None,
) -> dict[str, Any]:
    """Fits all heads, chooses their hyper-parameters, and measures each choice once.

    Writes `features/`, which later calls use again, `results.json`, and the checkpoint with the
    better of the two linear heads in `model/`.

    Args:
      checkpoint: As `pretrained.load` takes it.
      parts: "train", "validation" and "test", with the same classes.
      output: An existing folder, empty or of an earlier call.
      num_epochs: Epochs of the linear probe.
      batch_size: Images per step of the network, see `inference.compile_step`.
      trained_on: Images of "test" that the checkpoint was trained on; None: unknown.

    Returns:
      The content of `results.json`.

    Raises:
      UserError: The checkpoint is missing, its format cannot hold a head, or an image cannot be
        decoded.
    """
    class_names = parts["train"].class_names
    backbone = load_backbone(checkpoint)
    config = dataclasses.replace(backbone.model.config, num_classes=len(class_names))
    config_to_json(config)  # a format that cannot hold a head is an error before all the work
    start = time.monotonic()
    found = {
        name: features_of(backbone, split, folder=output / "features", batch_size=batch_size)
        for name, split in parts.items()
    }
    extracted = time.monotonic()
    results = fit_all(found, num_classes=len(class_names), num_epochs=num_epochs)
    best = max((r for r in results if r.head), key=lambda result: result.validation_accuracy)
    shutil.rmtree(output / "model", ignore_errors=True)  # of an earlier call
    content = {
        "checkpoint": checkpoint,
        "splits": manifest.describe_splits(parts),
        "trained_on": trained_on,
        "feature_dim": found["train"].features.shape[1],
        "methods": {result.method: _summary(result) for result in results},
        "model": {"method": best.method, "test_accuracy": best.test_accuracy_of_head},
        "seconds": {"features": extracted - start, "heads": time.monotonic() - extracted},
    }
    # results.json comes first: it marks the folder as made by this command.
    write_json(output / "results.json", content)
    save_with_head(output / "model", backbone, best.head, class_names)
    return content


def fit_all(parts: dict[str, Features], *, num_classes: int, num_epochs: int) -> list[Result]:
    """Returns the results of all methods on "train", "validation" and "test"."""
    scaling, scaled = standardise(parts)
    with doing("Looking for neighbours"):
        results = [neighbours(parts, num_classes=num_classes)]
    for fit in (ridge, linear_probe):
        options = {"num_epochs": num_epochs} if fit is linear_probe else {}
        with doing(f"Fitting {fit.__name__}"):
            result = fit(scaled, num_classes=num_classes, **options)
        head = scaling.fold(result.head)
        accuracy = float(_hits(_stacked(head), parts["test"]).mean())
        results.append(result._replace(head=head, test_accuracy_of_head=accuracy))
    return results


def standardise(parts: dict[str, Features]) -> tuple[heads.Scaling, dict[str, Features]]:
    """Scales all parts so that the features of "train" have mean 0 and standard deviation 1."""
    scaling = heads.scaling_of(parts["train"].features)
    return scaling, {
        name: part._replace(features=scaling(part.features)) for name, part in parts.items()
    }


def neighbours(parts: dict[str, Features], *, num_classes: int) -> Result:
    """Nearest neighbours; chooses the smallest of the best k."""
    train = parts["train"]
    max_k = len(train.labels)
    tried = tuple(k for k in NUM_NEIGHBOURS if k < max_k) or (max_k,)

    def hits(name: str, num_neighbours: tuple[int, ...]) -> np.ndarray:  # (number of k, N)
        votes = heads.neighbour_votes(
            train.features, train.labels, parts[name].features,
            num_neighbours=num_neighbours, num_classes=num_classes,
        )  # fmt: skip
        return (np.asarray(votes).argmax(axis=-1) == parts[name].labels[:, None]).T

    validation = hits("validation", tried).mean(axis=1)
    best = int(validation.argmax())
    test = hits("test", (tried[best],))
    return Result("knn", {"k": tried[best]}, float(validation[best]), test)


def ridge(parts: dict[str, Features], *, num_classes: int) -> Result:
    """Ridge regression; chooses the largest of the best regularisers."""
    found = heads.ridge(*parts["train"], regularisers=REGULARISERS[::-1], num_classes=num_classes)
    validation = _hits(found, parts["validation"]).mean(axis=1)
    best = int(validation.argmax())
    head = jax.tree.map(lambda leaf: leaf[best], found)
    chosen = {"regulariser": REGULARISERS[::-1][best]}
    test = _hits(_stacked(head), parts["test"])
    return Result("ridge", chosen, float(validation[best]), test, head)


def linear_probe(parts: dict[str, Features], *, num_classes: int, num_epochs: int) -> Result:
    """Softmax regression; chooses the learning rate and weight decay with the best mean accuracy.

    The mean is over seeds, and ties go to the lower mean loss. The head is that of the best seed.
    """
    train, validation = parts["train"], parts["validation"]
    pairs = np.array(list(itertools.product(LRS, WEIGHT_DECAYS)), np.float32)
    begin = time.monotonic()
    found = heads.fit_probes(
        *train, jnp.arange(NUM_SEEDS), *pairs.T,
        num_classes=num_classes, num_epochs=num_epochs, batch_size=BATCH_SIZE,
        at_once=_at_once(len(pairs), train.features.shape[1], num_classes),
    )  # fmt: skip
    accuracy, loss = map(np.asarray, heads.score(found, *validation))  # (S, T)
    log.info(
        "%d linear probes of %d epochs: %.1f s.",
        accuracy.size, num_epochs, time.monotonic() - begin,
    )  # fmt: skip
    best = _best(accuracy.mean(axis=0), loss.mean(axis=0))
    of_seeds = jax.tree.map(lambda leaf: leaf[:, best], found)
    seed = _best(accuracy[:, best], loss[:, best])
    return Result(
        "probe",
        {"lr": float(pairs[best, 0]), "weight_decay": float(pairs[best, 1])},
        float(accuracy[:, best].mean()),
        _hits(of_seeds, parts["test"]),
        jax.tree.map(lambda leaf: leaf[seed], of_seeds),
    )


def _best(accuracy: np.ndarray, loss: np.ndarray) -> int:
    """Index of the highest accuracy; ties go to the lowest loss, then to the first.

    A head that diverged, so that its loss is not finite, is never the best.

    Raises:
      UserError: All heads diverged.
    """
    is_finite = np.isfinite(loss) & np.isfinite(accuracy)
    if not is_finite.any():
        raise UserError(
            "The linear probe diverged with every learning rate: none of its losses is finite. The "
            "features are too large; the checkpoint's weights may be damaged."
        )
    keys = (np.where(is_finite, key, np.inf) for key in (loss, -accuracy))
    return int(np.lexsort(tuple(keys))[0])


def _at_once(num_pairs: int, dim: int, num_classes: int) -> int:
    """Number of hyper-parameter pairs whose trials fit into the first device's memory together."""
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    needed = NUM_SEEDS * heads.probe_bytes(dim, num_classes=num_classes, batch_size=BATCH_SIZE)
    fitting = max(_SHARE * footprint.available_bytes(mesh) // needed, 1)
    num_chunks = -(-num_pairs // min(fitting, num_pairs))
    return int(-(-num_pairs // num_chunks))  # equal chunks


def _hits(found: heads.Linear, part: Features) -> np.ndarray:
    """Which examples each of S stacked heads gets right, bool (S, N)."""
    as_float32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), found)
    return np.asarray(heads.hits(as_float32, *part))


def _stacked(head: heads.Linear) -> heads.Linear:
    return jax.tree.map(lambda leaf: leaf[None], head)


def _summary(result: Result) -> dict[str, Any]:
    test = result.test_accuracies
    summary = result.chosen | {
        "validation_accuracy": result.validation_accuracy,
        "test_accuracy": float(np.mean(test)),
    }
    return summary | ({"test_accuracies": test} if len(test) > 1 else {})


def save_with_head(
    directory: Path, backbone: Backbone, head: heads.Linear, class_names: Iterable[str]
) -> None:
    """Writes the backbone with a head as a folder in Hugging Face format.

    Args:
      directory: A new folder.
      backbone: The network.
      head: A head for its raw features.
      class_names: The K names.
    """
    id2label = dict(enumerate(class_names))
    config = dataclasses.replace(backbone.model.config, num_classes=len(id2label))
    variables = jax.device_get(backbone.variables)
    params = variables["params"] | _head_params(head, config)
    pretrained.save(
        directory,
        pretrained.make_model(config),
        dict(variables) | {"params": params},
        dataclasses.replace(backbone.processor, id2label=id2label),
    )


def _head_params(head: heads.Linear, config: pretrained.Config) -> dict[str, Any]:
    kernel = head.kernel.T  # (D, K)
    if getattr(config, "pool", None) != "cls_dist":
        return {HEADS[0]: {"kernel": kernel, "bias": head.bias}}
    # The logits are the mean of two heads, each on half of the features.
    return {
        name: {"kernel": 2 * half, "bias": head.bias}
        for name, half in zip(HEADS, np.split(kernel, 2), strict=True)
    }


def table(content: dict[str, Any]) -> str:
    """Returns the results as a text table."""
    lines = [f"{'method':8}{'chosen':36}{'validation':>12}{'test (seeds: lowest to highest)':>36}"]
    for method, found in content["methods"].items():
        chosen = ", ".join(
            f"{name}={value:g}" for name, value in found.items() if "accurac" not in name
        )
        test = f"{found['test_accuracy']:.4f}"
        if spread := found.get("test_accuracies"):
            test += f" ({min(spread):.4f} to {max(spread):.4f})"
        lines.append(f"{method:8}{chosen:36}{found['validation_accuracy']:12.4f}{test:>36}")
    return "\n".join(lines)
