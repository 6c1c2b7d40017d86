"""Weights and images that need not be stored: made by numpy, from names."""

import zlib

import numpy as np


def make_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor of a network, such that activations keep a sane size."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    noise = rng.standard_normal(shape, np.float32)
    if len(shape) == 1:  # scales vary about 1; biases and means about 0
        is_scale = name.endswith("weight")
        return 0.2 * noise + np.float32(is_scale)
    if "pos_embed" in name or "token" in name:
        return 0.5 * noise
    return noise / np.float32(np.prod(shape[1:]) ** 0.5)


def make_images(image_size: tuple[int, int]) -> np.ndarray:
    """float32 (2, H, W, 3), as a network takes them."""
    rng = np.random.default_rng(image_size)
    return rng.standard_normal((2, *image_size, 3), np.float32)


def make_picture(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3) noise."""
    return np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), np.uint8)
