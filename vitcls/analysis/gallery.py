"""Images of a run to look at: its mistakes, its doubts, and what training showed it."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from vitcls.analysis import figures
from vitcls.analysis.predictions import Predictions
from vitcls.analysis.run import Run, restored_config

log = logging.getLogger("vitcls")

NUM_SHOWN = 24
_SIZE = 144  # pixels

# RGB images of a split in, one picture for each out, such as where the network looked.
Explain = Callable[[Sequence[Image.Image]], Sequence[Image.Image]]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image of the page.

    Attributes:
      pictures: Data URIs: the image, and what explains it; empty where it cannot be read.
      id: Its id; of augmented images empty.
      label: Its class, or its target.
      predicted: The likeliest class; of augmented images empty.
      confidence: Its probability.
    """

    pictures: list[str]
    id: str
    label: str
    predicted: str = ""
    confidence: float = 0.0


def worst_mistakes(found: Predictions) -> np.ndarray:
    """Positions of the mistakes that the network was most sure of, those first."""
    confidence, is_wrong = found.probabilities.max(1), found.logits.argmax(1) != found.labels
    order = np.argsort(-confidence, kind="stable")
    return order[is_wrong[order]][:NUM_SHOWN]


def least_certain(found: Predictions) -> np.ndarray:
    """Positions of the images with the smallest largest probability, those first."""
    return np.argsort(found.probabilities.max(1), kind="stable")[:NUM_SHOWN]


def tiles(
    found: Predictions,
    positions: np.ndarray,
    images: Sequence[Image.Image | None],
    class_names: Sequence[str],
    *,
    explain: Explain | None = None,
) -> list[Tile]:
    """What to show of the images at `positions`, which `images` are, None where there is none."""
    readable = [image for image in images if image is not None]
    explained = iter(explain(readable) if explain and readable else ())
    probabilities = found.probabilities
    shown = []
    for position, image in zip(positions.tolist(), images, strict=True):
        predicted = int(found.logits[position].argmax())
        pictures = [] if image is None else [image, *([next(explained)] if explain else [])]
        shown.append(
            Tile(
                pictures=[figures.data_uri(picture, size=_SIZE) for picture in pictures],
                id=str(found.ids[position]),
                label=class_names[found.labels[position]],
                predicted=class_names[predicted],
                confidence=float(probabilities[position, predicted]),
            )
        )
    return shown


def open_images(
    run: Run, split_name: str, ids: Sequence[str]
) -> tuple[list[Image.Image | None], str]:
    """The images with these ids, None for what cannot be read, and why there are none, or "".

    Whatever the data source raises, the numbers are worth a page: it is only said.
    """
    from vitcls import train_setup  # imports jax, the data libraries: only where images are shown

    nothing = [None] * len(ids)
    if not run.config:
        return nothing, "The images cannot be shown: config.json, which names them, is missing."
    try:
        _, evaluated = train_setup.open_splits(restored_config(run.config))
        if split_name not in evaluated:
            return nothing, "The images cannot be shown: config.json does not evaluate this split."
        split = evaluated[split_name]
        data = run.manifest.get("data")
        known = data.get(split.name) if isinstance(data, dict) else None
        if known and known.get("fingerprint") != split.fingerprint:
            return nothing, "The images are not shown: the data have changed since the run."
        index_of = {split.id(index): index for index in range(len(split))}
        return [_read(split, index_of.get(id)) for id in ids], ""
    except Exception as error:
        log.warning("The images of %s cannot be shown: %s", split_name, error)
        return nothing, f"The images cannot be shown: {_said(error)}"


def _read(split, index: int | None) -> Image.Image | None:
    from vitcls.images import ImageError

    try:
        return None if index is None else split.image(index)[0]
    except ImageError:
        return None


def augmented(run: Run) -> tuple[list[Tile], str]:
    """The first training images as the network saw them, and why there are none, or ""."""
    from vitcls import data_checks

    if not run.config:
        return [], "Training images cannot be shown: config.json, which names them, is missing."
    try:
        config = restored_config(run.config)
        # The first rows of a batch are the same whatever its size: the rest need not be made.
        config.train.global_batch_size = min(config.train.global_batch_size, 2 * NUM_SHOWN)
        begun = run.workdir if (run.workdir / "model" / "config.json").is_file() else None
        shown = data_checks.training_images(config, num=NUM_SHOWN, begun=begun)
    except Exception as error:
        log.warning("Training images cannot be shown: %s", error)
        return [], f"Training images cannot be shown: {_said(error)}"
    return [
        Tile(
            pictures=[figures.data_uri(image, size=_SIZE)],
            id="",
            label=target.replace("\n", ", "),
        )
        for image, target in shown
    ], ""


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
