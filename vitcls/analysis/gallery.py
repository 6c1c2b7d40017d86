"""Images of a run: its mistakes, its least certain answers, its training images."""

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

# RGB images and the class to explain of each -> the pictures of each image, and their caption.
Explain = Callable[
    [Sequence[Image.Image], Sequence[int]], tuple[Sequence[Sequence[Image.Image]], str]
]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image of the page.

    Attributes:
      pictures: Data URIs of the image and its explanation; empty if it cannot be read.
      id: Its id; empty for augmented images.
      label: Its class, or its target.
      predicted: The likeliest class; empty for augmented images.
      confidence: Probability of the likeliest class.
    """

    pictures: list[str]
    id: str
    label: str
    predicted: str = ""
    confidence: float = 0.0


def worst_mistakes(found: Predictions) -> np.ndarray:
    """Positions of the mistakes, the most confident first."""
    confidence, is_wrong = found.probabilities.max(1), found.logits.argmax(1) != found.labels
    order = np.argsort(-confidence, kind="stable")
    return order[is_wrong[order]][:NUM_SHOWN]


def least_certain(found: Predictions) -> np.ndarray:
    """Positions of the images, the least confident first."""
    return np.argsort(found.probabilities.max(1), kind="stable")[:NUM_SHOWN]


def explain_images(
    found: Predictions,
    positions: np.ndarray,
    images: Sequence[Image.Image | None],
    explain: Explain | None,
) -> tuple[list[Sequence[Image.Image]], str]:
    """The pictures of each image at `positions`, none for None, and their caption.

    If explaining fails, the images are shown without maps, and the caption says why.
    """
    plain = [[] if image is None else [image] for image in images]
    rows = [row for row, image in enumerate(images) if image is not None]
    if explain is None or not rows:
        return plain, ""
    predicted = found.logits[positions].argmax(1)[rows].tolist()
    try:
        pictures, said = explain([images[row] for row in rows], predicted)
    except Exception as error:
        log.warning("Explanation maps are left out: %s", error)
        return plain, f"Explanation maps are left out: {_said(error)}"
    shown = dict(zip(rows, pictures, strict=True))
    return [shown.get(row, []) for row in range(len(images))], said


def make_tiles(
    found: Predictions,
    positions: np.ndarray,
    pictures: Sequence[Sequence[Image.Image]],
    class_names: Sequence[str],
) -> list[Tile]:
    """A tile for each image at `positions`, with its pictures, if any."""
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
    """The images with these ids, None for unreadable ones, and why there are none, or "".

    If the data source fails, the page still shows the numbers, and says why images are missing.
    """
    # Imported here: it brings jax and the data libraries.
    from vitcls.run import splits

    nothing = [None] * len(ids)
    if not run.config:
        return nothing, "The images cannot be shown: config.json, which names the data, is missing."
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


def augmented_tiles(run: Run) -> tuple[list[Tile], str]:
    """Tiles of the first training images as the network saw them, and why there are none, or ""."""
    from vitcls.check_data import checks
    from vitcls.run.opened import Begun

    if not run.config:
        return [], "Training images cannot be shown: config.json, which names the data, is missing."
    try:
        config = restored_config(run.config)
        # The first rows of a batch do not depend on its size, so that a small one will do.
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
