"""Computes and writes maps of where a checkpoint's network looks.

B batch, H W pixels, K classes.
"""

import csv
import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vitcls import inference
from vitcls.analysis import gallery, overlay, saliency
from vitcls.data.images import ImageError, decode
from vitcls.data.sources.split import Split
from vitcls.errors import UserError, unknown
from vitcls.files import folder_aside
from vitcls.logs import progress
from vitcls.pretrained import Processor
from vitcls.step import sharding
from vitcls.step.eval_step import probabilities

log = logging.getLogger("vitcls")

# The name of an image, and a function that returns its encoded bytes.
Source = tuple[str, Callable[[], bytes]]

_CAPTIONS = {
    "rollout": "where attention comes from (attention rollout, the same for every class)",
    "gradient_rollout": "where it looked for the class it predicted (gradient-weighted attention "
    "rollout)",
    "gradcam": "where it looked for the class it predicted (Grad-CAM)",
}
_COLUMNS = ("image", "label", "probability", "explained", "picture", "error")
_NUM_LOGGED = 10  # unreadable images in the log; the table lists all


@dataclasses.dataclass(frozen=True)
class Explainer:
    """A network on all devices, with a method that explains its answers."""

    method: str
    processor: Processor
    variables: Any  # on every device of `mesh`
    mesh: Mesh
    step: Callable[[Any, Any], Any]  # compiled for batches of `batch_size`
    batch_size: int

    def __call__(
        self, pixels: Sequence[np.ndarray], classes: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the map of each image, float32 (H, W), and its probabilities (K,).

        Args:
          pixels: uint8 (H, W, 3) each, as the processor makes them.
          classes: The class to explain for each image; negative: the likeliest.
        """
        size = self.batch_size
        for first in range(0, len(pixels), size):
            rows = np.stack(pixels[first : first + size])
            asked = np.asarray(classes[first : first + size], np.int32)
            batch = {
                "image": np.pad(rows, [(0, size - len(rows)), (0, 0), (0, 0), (0, 0)]),
                "class": np.pad(asked, (0, size - len(asked))),
            }
            found = self.step(self.variables, sharding.to_global(batch, self.mesh))
            yield from zip(*(np.asarray(part)[: len(rows)] for part in found), strict=True)


def load_explainer(
    checkpoint: str | Path, *, num_images: int, method: str = "", batch_size: int = 0
) -> Explainer:
    """Loads a checkpoint and compiles its explanation step.

    Args:
      checkpoint: As `pretrained.load` takes it.
      num_images: Number of images to explain.
      method: A key of `saliency.METHODS`; "": the default for this network.
      batch_size: Images at a time over all devices; 0: chosen by their memory.

    Raises:
      UserError: The checkpoint does not exist or has no classes, or the method does not fit.
    """
    model, variables, processor, mesh = inference.load_classifier(checkpoint)
    method = saliency.choose_method(model, method)

    def step(variables, batch):
        images = processor.normalise(batch["image"])
        found, logits = saliency.compute_maps(
            model, variables, images, batch["class"], method=method
        )
        return found, probabilities(logits)

    compiled, batch_size = inference.compile_step(
        jax.jit(step, out_shardings=sharding.batch_sharding(mesh)),
        variables,
        {
            "image": jax.ShapeDtypeStruct((*processor.size, 3), np.uint8),
            "class": jax.ShapeDtypeStruct((), np.int32),
        },
        mesh=mesh,
        num_images=num_images,
        batch_size=batch_size,
    )
    return Explainer(method, processor, variables, mesh, compiled, batch_size)


def for_gallery(checkpoint: str | Path) -> gallery.Explain:
    """Returns a function that shows what the network saw of each image, and where it looked."""

    def explain(
        images: Sequence[Image.Image], classes: Sequence[int]
    ) -> tuple[list[list[Image.Image]], str]:
        explainer = load_explainer(checkpoint, num_images=len(images))
        pixels = [explainer.processor.pixels(image) for image in images]
        ids = [f"picture {number}" for number in range(1, len(images) + 1)]
        shown = [
            [Image.fromarray(one), overlay.draw_map(one, heat)]
            for one, (heat, _) in zip(
                pixels, _explain(explainer, pixels, classes, ids=ids), strict=True
            )
        ]
        what = _CAPTIONS[explainer.method]
        return shown, f"Images as the network saw them. The bright places beside them show {what}."

    return explain


def _explain(
    explainer: Explainer,
    pixels: Sequence[np.ndarray],
    classes: Sequence[int],
    *,
    ids: Sequence[str],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """All that `explainer` yields; raises `NotFinite`, which names images by `ids`."""
    found = list(explainer(pixels, classes))
    for part in zip(*found, strict=True):
        inference.check_answers(np.stack(part), ids.__getitem__)
    return found


def file_sources(paths: Sequence[str]) -> list[Source]:
    """One source per file."""
    return [(path, Path(path).read_bytes) for path in paths]


def split_sources(split: Split, *, num: int) -> list[Source]:
    """Sources of the first `num` images of a split; 0: all."""

    def reader(index: int) -> Callable[[], bytes]:
        return lambda: split.read(index)[0]

    return [(split.id(index), reader(index)) for index in range(len(split))[: num or None]]


def class_index(name: str, names: Sequence[str]) -> int:
    """Returns the class that `--class` gives by name, or else by number; -1 for "".

    Raises:
      UserError: The class does not exist.
    """
    if not name:
        return -1
    if name in names:
        return list(names).index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise unknown("--class", name, names)


def write_pictures(
    explainer: Explainer, sources: Sequence[Source], output: str, *, class_name: str
) -> int:
    """Writes a picture for each image, and `explained.csv`, which describes the pictures.

    A picture shows what the network saw of the image, and next to it the same under the map. The
    folder appears once it is complete.

    Args:
      explainer: The network.
      sources: The images.
      output: A new or empty folder.
      class_name: The class to explain; "": the likeliest of each image.

    Returns:
      The number of images that cannot be read.

    Raises:
      UserError: The folder is in use, the class does not exist, no image can be read, or an answer
        is not finite.
    """
    names = explainer.processor.class_names
    asked = class_index(class_name, names)
    num_bad = 0
    with (
        folder_aside(output) as folder,
        (folder / "explained.csv").open(
            "w", encoding="utf-8", errors="surrogateescape", newline=""
        ) as file,
    ):
        table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        table.writeheader()
        numbered = enumerate(progress.track(sources, "explain"))
        for chunk in iter(lambda: list(itertools.islice(numbered, explainer.batch_size)), []):
            rows = [_read(explainer, source) for _, source in chunk]
            readable = [row for row, (pixels, _) in enumerate(rows) if pixels is not None]
            found = iter(
                _explain(
                    explainer, [rows[row][0] for row in readable], [asked] * len(readable),
                    ids=[chunk[row][1][0] for row in readable],
                )
            )  # fmt: skip
            for (number, (name, _)), (pixels, error) in zip(chunk, rows, strict=True):
                if pixels is None:
                    num_bad += 1
                    if num_bad <= _NUM_LOGGED:
                        log.warning("%s: %s", name, error)
                    table.writerow({"image": name, "error": error})
                    continue
                heat, probabilities = next(found)
                picture = f"{number:05}_{_file_name(name)}.png"
                overlay.side_by_side(pixels, overlay.draw_map(pixels, heat)).save(folder / picture)
                likeliest = int(probabilities.argmax())
                table.writerow({
                    "image": name, "label": names[likeliest],
                    "probability": str(probabilities[likeliest]), "picture": picture,
                    "explained": "" if explainer.method == "rollout"
                    else names[likeliest if asked < 0 else asked],
                })  # fmt: skip
        if num_bad == len(sources):
            raise UserError(f"None of the {num_bad} images can be read, such as {name}: {error}")
    return num_bad


def _read(explainer: Explainer, source: Source) -> tuple[np.ndarray | None, str]:
    """The pixels that the network sees, or None and the reason."""
    try:
        return explainer.processor.pixels(decode(source[1]())), ""
    except ImageError as error:
        return None, str(error)
    except OSError as error:
        return None, f"Cannot be read: {error.strerror}."


def _file_name(name: str) -> str:
    """The last part of an image's name, in characters that every file system allows."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", Path(name).name)[-60:]
