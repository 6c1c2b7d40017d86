"""Position embeddings for another image size, as torch resizes them."""

import numpy as np

# Keys' cubic convolution (1981) with a = -0.75, as in torch and OpenCV. `jax.image.resize` and
# Pillow take a = -0.5.
_A = -0.75


def resize_positions(
    positions: np.ndarray, *, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    """Resizes the patches' part of position embeddings; the rows before it stay as they are.

    Equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` without
    antialiasing, which is what Hugging Face's `interpolate_pos_encoding` calls.

    Args:
      positions: float32 (1, T + h w, D): T prefix tokens, then the grid in row-major order.
      old: The grid (h, w) they are for.
      new: The grid they are wanted for.

    Returns:
      float32 (1, T + new h * new w, D).
    """
    dim = positions.shape[-1]
    prefix, grid = np.split(positions, [positions.shape[1] - old[0] * old[1]], axis=1)
    rows, columns = (_matrix(a, b) for a, b in zip(old, new, strict=True))
    grid = np.einsum("ih,jw,hwd->ijd", rows, columns, grid.reshape(*old, dim), optimize=True)
    return np.concatenate([prefix, grid.reshape(1, -1, dim)], axis=1).astype(np.float32)


def _matrix(old: int, new: int) -> np.ndarray:
    """(new, old) float64: the weight of each old point in each new one; rows sum to 1."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5  # pixel centres, align_corners=False
    first = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        point = np.clip(first + tap, 0, old - 1)  # the border is repeated
        np.add.at(matrix, (np.arange(new), point), _cubic(np.abs(centre - first - tap)))
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    """Weight of a point at distance `x` in [0, 2]."""
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = _A * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, far)
