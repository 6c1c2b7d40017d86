"""Makes random JPEG files like those of ImageNet: 203 000 pixels, 109 kB, detail at all scales."""

import concurrent.futures
import os
from pathlib import Path

import numpy as np
from PIL import Image

# (width, height) in turn: the mean area is ImageNet's.
SIZES = ((500, 375), (375, 500), (500, 333), (500, 500), (640, 427), (480, 320))
QUALITY = 90
NUM_CLASSES = 8


def make_folder(folder: Path, num_images: int, *, scale: float = 1.0) -> None:
    """Writes folder/train/CLASS/NUMBER.jpg, the same ones every time.

    Args:
      folder: A new or empty folder.
      num_images: Number of files.
      scale: Factor of the sides, for larger originals.
    """
    for label in range(NUM_CLASSES):
        (folder / "train" / f"class{label}").mkdir(parents=True)

    def write(number: int) -> None:
        width, height = (round(scale * side) for side in SIZES[number % len(SIZES)])
        pixels = random_pixels(np.random.default_rng(number), width, height)
        path = folder / "train" / f"class{number % NUM_CLASSES}" / f"{number:05}.jpg"
        Image.fromarray(pixels).save(path, quality=QUALITY)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(num_images)))


def random_pixels(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns uint8 (height, width, 3): noise of all scales, weaker at finer scales."""
    total = np.zeros((height, width, 3), np.float32)
    for level in range(7):
        step = 2**level
        shape = (-(-height // step), -(-width // step), 3)
        noise = rng.integers(0, 256, shape, np.uint8)
        noise = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(noise, np.float32) - 127.5) * (0.16 * 1.35**level)
    return np.clip(total + 127.5, 0, 255).astype(np.uint8)
