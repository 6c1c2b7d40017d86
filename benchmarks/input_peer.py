"""The peers of `benchmarks.input_pipeline`: tf.data and torch's DataLoader doing the same work.

Each runs in a separate process, through `benchmarks.peer_process`. Crops have the same area and
aspect ratios as ours, see SCALE and RATIO there; both read the same files.
"""

import importlib.metadata
import importlib.util
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

_batches: Iterator[Any]  # endless, made by a function below


def start_tf(
    paths: list[str], *, batch_size: int, size: int, scale: list[float], ratio: list[float],
    antialias: bool,
) -> dict[str, Any]:  # fmt: skip
    """Decodes only the crop's region and scales bilinearly, with or without Pillow's smoothing."""
    global _batches
    import tensorflow as tf

    def load(path):
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros([0, 0, 4]), area_range=scale, aspect_ratio_range=ratio,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.concat([begin[:2], extent[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        return tf.cast(tf.image.resize(image, [size, size], antialias=antialias), tf.uint8)

    batches = tf.data.Dataset.from_tensor_slices(paths).repeat().shuffle(len(paths))
    batches = batches.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    batches = batches.batch(batch_size, drop_remainder=True).prefetch(4)
    _batches = batches.as_numpy_iterator()
    variant = f"tf.data, decode_and_crop_jpeg{', smoothed' if antialias else ''}"
    return {"variant": variant, "versions": {"tensorflow": tf.__version__}}


def start_torch(
    paths: list[str], *, batch_size: int, size: int, scale: list[float], ratio: list[float],
    num_workers: int,
) -> dict[str, Any]:  # fmt: skip
    """Does torchvision's steps on Pillow images, in worker processes."""
    global _batches
    import torch

    packages = ["torch", "Pillow"]
    if importlib.util.find_spec("torchvision"):
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(size, tuple(scale), tuple(ratio))
        transform, variant = v2.Compose([crop, v2.PILToTensor()]), "torchvision v2"
        packages.append("torchvision")
    else:
        transform, variant = _Crop(size, scale, ratio), "torchvision's steps, in Pillow"
    indices = (int(torch.randint(len(paths), ())) for _ in itertools.count())
    loader = torch.utils.data.DataLoader(
        _Files(paths, transform), batch_sampler=_grouped(indices, batch_size),
        num_workers=num_workers,
    )  # fmt: skip
    _batches = iter(loader)
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"variant": f"DataLoader, {num_workers} processes, {variant}", "versions": versions}


def _grouped(numbers: Iterator[int], batch_size: int) -> Iterator[list[int]]:
    while True:
        yield list(itertools.islice(numbers, batch_size))


class _Files:
    """A data set of torch, by its protocol."""

    def __init__(self, paths, transform):
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int):
        with Image.open(self._paths[index]) as image:
            return self._transform(image.convert("RGB"))


class _Crop:
    """The steps of torchvision's RandomResizedCrop on a Pillow image: `crop`, then `resize`."""

    def __init__(self, size: int, scale: list[float], ratio: list[float]):
        self._size, self._scale, self._ratio = size, scale, ratio

    def __call__(self, image: Image.Image):
        import torch

        width, height = image.size
        for _ in range(10):
            area = width * height * float(torch.empty(1).uniform_(*self._scale))
            aspect = math.exp(float(torch.empty(1).uniform_(*map(math.log, self._ratio))))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w = h = min(width, height)
        left = int(torch.randint(width - w + 1, ()))
        top = int(torch.randint(height - h + 1, ()))
        image = image.crop((left, top, left + w, top + h))
        image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def run(num_batches: int, num_ahead: int) -> float:
    """Returns the seconds of the next batches, after skipping `num_ahead` prepared ones."""
    return pull(_batches, num_batches, num_ahead)


def pull(batches: Iterator[Any], num_batches: int, num_ahead: int) -> float:
    """See `run`."""
    for _ in range(num_ahead):
        next(batches)
    begin = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return time.perf_counter() - begin
