"""Images of a run to look at: its mistakes, its doubts, and what training showed it."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from vitcls.analysis import figures
from vitcls.analysis.predictions import Predictions
from vitcls.analysis.run import Run, restored_config
from vitcls.folders.workdir import Workdir

log = logging.getLogger("vitcls")

NUM_SHOWN = 24
_SIZE = 144  # pixels

# RGB images and the class to explain of each -> the pictures to show of each, and what they are.
Explain = Callable[
    [Sequence[Image.Image], Sequence[int]], tuple[Sequence[Sequence[Image.Image]], str]
]


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


def explained(
    found: Predictions,
    positions: np.ndarray,
    images: Sequence[Image.Image | None],
    explain: Explain | None,
) -> tuple[list[Sequence[Image.Image]], str]:
    """The pictures of each image at `positions`, none of None, and what they are.

    Whatever goes wrong, the images are worth showing without maps: it is only said.
    """
    plain = [[] if image is None else [image] for image in images]
    rows = [row for row, image in enumerate(images) if image is not None]
    if explain is None or not rows:
        return plain, ""
    predicted = found.logits[positions].argmax(1)[rows].tolist()
    try:
        pictures, said = explain([images[row] for row in rows], predicted)
    except Exception as error:
        log.warning("There are no explanation maps: %s", error)
        return plain, f"There are no explanation maps: {_said(error)}"
    shown = dict(zip(rows, pictures, strict=True))
    return [shown.get(row, []) for row in range(len(images))], said


def tiles(
    found: Predictions,
    positions: np.ndarray,
    pictures: Sequence[Sequence[Image.Image]],
    class_names: Sequence[str],
) -> list[Tile]:
    """What to show of the images at `positions`, of which there are these pictures, if any."""
    probabilities = found.probabilities
    shown = []
    for position, own in zip(positions.tolist(), pictures, strict=True):
        predicted = int(found.logits[position].argmax())
        shown.append(
            Tile(
                pictures=[figures.data_uri(picture, size=_SIZE) for picture in own],
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
    from vitcls.run import splits  # imports jax, the data libraries: only where images are shown

    nothing = [None] * len(ids)
    if not run.config:
        return nothing, "The images cannot be shown: config.json, which names them, is missing."
    try:
        _, evaluated = splits.open_splits(restored_config(run.config), is_continued=True)
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
    from vitcls.data.images import ImageError

    try:
        return None if index is None else split.image(index)[0]
    except ImageError:
        return None


def augmented(run: Run) -> tuple[list[Tile], str]:
    """The first training images as the network saw them, and why there are none, or ""."""
    from vitcls.check_data import checks
    from vitcls.run.opened import Begun

    if not run.config:
        return [], "Training images cannot be shown: config.json, which names them, is missing."
    try:
        config = restored_config(run.config)
        # The first rows of a batch are the same whatever its size: the rest need not be made.
        config.train.global_batch_size = min(config.train.global_batch_size, 2 * NUM_SHOWN)
        model = Workdir(run.workdir).model
        begun = Begun(config, model) if (model / "config.json").is_file() else None
        shown = checks.training_images(config, num=NUM_SHOWN, begun=begun)
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
