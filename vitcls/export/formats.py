"""Writes networks in formats that do not need vitcls, and compares them with the original.

B batch, H W pixels, K classes.
"""

import functools
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.export
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import load_file

from vitcls import __version__, inference, pretrained
from vitcls.decision import kept
from vitcls.export import model_card, rejection
from vitcls.files import folder_aside, write_json
from vitcls.pretrained.files import formats
from vitcls.pretrained.run import find_run
from vitcls.processes.devices import start_devices
from vitcls.step.eval_step import make_predict_step

log = logging.getLogger("vitcls")

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS = "model.stablehlo", "weights.safetensors"
_NUM_IMAGES = 7

_HUGGINGFACE_USAGE = """\
`FOLDER` is this folder, or its id on the hub.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="FOLDER")
print(classify("image.png"))
```

In JAX, with vitcls:

```python
from PIL import Image
from vitcls import pretrained

model, variables, processor = pretrained.load("FOLDER")
logits = model.apply(variables, processor([Image.open("image.png")]), train=False)
print(processor.id2label[int(logits[0].argmax())])
```
"""
_STABLEHLO_USAGE = """\
Run this in the folder; it needs jax, safetensors and Pillow:

```python
{loader}```

Images are RGB and upright; transparent ones are put on white. Batches may have any size, and each
new size is compiled once. Made with jax {version}, for {platforms}; jax runs programs of versions
up to six months older than itself.
"""
_LOADER = """\
import json
import numpy as np
from jax import export
from PIL import Image, ImageOps
from safetensors.numpy import load_file

program = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
weights = load_file("weights.safetensors")
names = json.load(open("config.json"))["id2label"]
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{prepare}
probabilities = np.asarray(program.call(weights, np.asarray(image)[None]))  # float32 (1, K)
print(names[str(probabilities[0].argmax())], probabilities[0].max())
"""


class Source(NamedTuple):
    """A network to export, as `pretrained.load` returns it, and its origin."""

    origin: model_card.Origin
    model: nn.Module
    variables: Mapping[str, Any]
    processor: pretrained.Processor
    decision: dict[str, Any] | None  # content of its decision.json

    def card(self, name: str, *, library: str, usage: str) -> str:
        return model_card.make_card(
            name, self.model.config, self.processor.id2label,
            origin=self.origin, library=library, usage=usage,
        )  # fmt: skip


class Check(NamedTuple):
    """Outputs for the same images, float32 (B, K), of the original and of the exported network."""

    expected: np.ndarray
    found: np.ndarray
    tolerance: float  # for the largest absolute difference
    checked_with: tuple[str, ...]  # packages


def export(checkpoint: str, *, format: str, output: str | Path) -> dict[str, Any]:
    """Writes a checkpoint in a format and compares the result with the original.

    Args:
      checkpoint: As `pretrained.load` takes it.
      format: A name in `FORMATS`.
      output: The folder to make, new or empty. It appears when the comparison is done.

    Returns:
      The content of `export.json`.

    Raises:
      UserError: The checkpoint cannot be loaded, has no head or gives nan, or the folder is in use.
      RuntimeError: The exported network gives other outputs; nothing is left of it.
    """
    # Matrix products of GPUs and TPUs have 8 to 11 bits by default, too few for a comparison.
    start_devices()
    with folder_aside(output) as aside, jax.default_matmul_precision("highest"):
        source = _load(checkpoint)
        check = FORMATS[format](aside, Path(output).resolve().name, source)
        inference.check_answers(check.expected, "random image {}".format)
        difference = float(np.max(np.abs(check.found - check.expected)))
        # Written so that nan is an error.
        if not difference <= check.tolerance:
            raise RuntimeError(
                f"The exported network differs from {checkpoint}: by {difference:.1e}, and "
                f"{check.tolerance:.1e} is allowed. Nothing was left in {output}."
            )
        packages = {"jax", "flax", "safetensors", *check.checked_with} - {"vitcls"}
        record = {
            "format": format,
            "checkpoint": source.origin.name,
            "checked_with": list(check.checked_with),
            "platform": jax.default_backend(),
            "num_images": _NUM_IMAGES,
            "largest_difference": difference,
            "tolerance": check.tolerance,
            "versions": {"python": platform.python_version(), "vitcls": __version__}
            | {name: importlib.metadata.version(name) for name in sorted(packages)},
        }
        write_json(aside / "export.json", record)
    return record


def _load(checkpoint: str) -> Source:
    # "best" and "main" are resolved first, so that exactly what the card names is loaded.
    run = find_run(checkpoint)
    if run is not None:
        origin = model_card.origin_of_run(run.directory, step=run.step())
        location = origin.name
    else:
        files = pretrained.find(checkpoint)
        origin, location = model_card.origin_of_files(files), files.directory
    model, variables, processor = pretrained.load(location)
    inference.check_has_head(checkpoint, processor)
    return Source(origin, model, variables, processor, kept.find(location))


def _random_images(size: tuple[int, int]) -> list[Image.Image]:
    """The same images in every call, smaller and larger than the network's (height, width)."""
    rng = np.random.default_rng(0)
    shapes = [
        [rng.integers(side // 2 + 1, 2 * side + 1) for side in size] for _ in range(_NUM_IMAGES)
    ]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]


def write_huggingface(directory: Path, name: str, source: Source) -> Check:
    """Writes a folder for `transformers` with a model card; compares logits of images.

    Args:
      directory: An empty folder.
      name: The name of the network in the card.
      source: The network.
    """
    _, model, variables, processor, decision = source
    pretrained.save(directory, model, variables, processor)
    usage = _HUGGINGFACE_USAGE + rejection.write(directory, decision, has_logits=True)
    card = source.card(name, library="transformers", usage=usage)
    (directory / "README.md").write_text(card, encoding="utf-8")
    images = _random_images(processor.size)
    apply = jax.jit(functools.partial(model.apply, train=False))
    expected = np.asarray(apply(variables, processor(images)))
    # Rounding errors of float32 grow with the terms that a logit is the sum of.
    tolerance = 1e-4 * max(1.0, float(np.max(np.abs(expected))))
    try:
        found = _transformers_logits(directory, images)
    except ImportError:
        log.info("Compared with vitcls' own reader only: torch and transformers are not installed.")
        model, variables, processor = pretrained.load(directory)
        found = np.asarray(apply(variables, processor(images)))
        return Check(expected, found, tolerance, ("vitcls",))
    return Check(expected, found, tolerance, ("transformers", "torch"))


def _transformers_logits(directory: Path, images: list[Image.Image]) -> np.ndarray:
    """Logits (B, K) of the written folder; raises `ImportError` if a package is missing."""
    # These are optional, so they are not imported above.
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # for reading the weights
    # The default is torchvision if it is installed, whose resizing rounds pixels differently.
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(directory)
    with torch.no_grad():
        return model(**processor(images, return_tensors="pt")).logits.numpy()


def write_stablehlo(directory: Path, name: str, source: Source) -> Check:
    """Writes a program, its weights and a card; compares probabilities of batches of 1 and 7.

    The program is `(weights, uint8 images (B, H, W, 3)) -> float32 probabilities (B, K)` for any B,
    with products in full float32 on every platform. The weights are `{name: array}` in a
    safetensors file, since the program's own format is limited to 2 GB.

    Args:
      directory: An empty folder.
      name: The name of the network in the card.
      source: The network.
    """
    _, model, variables, processor, decision = source
    predict = make_predict_step(processor.normalise, model.apply)

    def program(weights, images):
        return predict(unflatten_dict(weights, sep="/"), images)

    weights = flatten_dict(variables, sep="/")
    (batch_size,) = jax.export.symbolic_shape("B")
    shape = jax.ShapeDtypeStruct((batch_size, *processor.size, 3), np.uint8)
    limit = jax.config.jax_traceback_in_locations_limit
    # Locations in the program would contain this machine's paths.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(weights, shape)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    (directory / PROGRAM).write_bytes(exported.serialize())
    formats.write(directory / WEIGHTS, weights)
    pretrained.write_config(directory, model.config, processor)
    usage = _STABLEHLO_USAGE.format(
        loader=make_loader(processor), version=jax.__version__, platforms=", ".join(PLATFORMS)
    )
    usage += rejection.write(directory, decision, has_logits=False)
    card = source.card(name, library="jax", usage=usage)
    (directory / "README.md").write_text(card, encoding="utf-8")

    images = np.stack([processor.pixels(image) for image in _random_images(processor.size)])
    # The same network rounds differently for each batch size, so both are compared.
    batches = images, images[:1]
    original = jax.jit(predict)
    expected = np.concatenate([original(variables, batch) for batch in batches])
    written = jax.export.deserialize(bytearray((directory / PROGRAM).read_bytes()))
    weights = load_file(directory / WEIGHTS)
    found = np.concatenate([written.call(weights, batch) for batch in batches])
    return Check(expected, found, 1e-5, ("jax",))


def make_loader(processor: pretrained.Processor) -> str:
    """Returns Python that runs a folder of `write_stablehlo` with jax, safetensors and Pillow."""
    height, width = processor.size
    size = f"({width}, {height})"  # Pillow's order
    if isinstance(processor.resize, int):
        size = f"[{processor.resize} * side // min(image.size) for side in image.size]"
    elif processor.resize is not None:
        size = str(processor.resize[::-1])
    lines = [f"image = image.resize({size}, Image.Resampling.{processor.resample.upper()})"]
    if processor.resize is not None:
        lines += [
            f"left, top = (image.width - {width}) // 2, (image.height - {height}) // 2",
            f"image = image.crop((left, top, left + {width}, top + {height}))",
        ]
    return _LOADER.format(prepare="\n".join(lines))


FORMATS: Mapping[str, Callable[[Path, str, Source], Check]] = {
    "huggingface": write_huggingface,
    "stablehlo": write_stablehlo,
}
