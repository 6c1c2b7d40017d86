"""Position embeddings for another image size, as torch resizes them."""

import numpy as np

# Keys' cubic convolution (1981): a as torch and OpenCV take it, and as Pillow, `jax.image.resize`
# and torch's antialiasing do.
_A, _A_ANTIALIAS = -0.75, -0.5


def resize_positions(
    positions: np.ndarray,
    *,
    old: tuple[int, int],
    new: tuple[int, int],
    antialias: bool = False,
) -> np.ndarray:
    """Resizes the patches' part of position embeddings; the rows before it stay as they are.

    Equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, which is what
    Hugging Face's `interpolate_pos_encoding` calls.

    Args:
      positions: float32 (1, T + h w, D): T prefix tokens, then the grid in row-major order.
      old: The grid (h, w) they are for.
      new: The grid they are wanted for.
      antialias: Whether to widen the filter where the grid becomes smaller. torch's filter then
        also differs where the grid becomes larger.

    Returns:
      float32 (1, T + new h * new w, D).
    """
    dim = positions.shape[-1]
    prefix, grid = np.split(positions, [positions.shape[1] - old[0] * old[1]], axis=1)
    matrix = _antialiased_matrix if antialias else _matrix
    rows, columns = (matrix(a, b) for a, b in zip(old, new, strict=True))
    grid = np.einsum("ih,jw,hwd->ijd", rows, columns, grid.reshape(*old, dim), optimize=True)
    return np.concatenate([prefix, grid.reshape(1, -1, dim)], axis=1).astype(np.float32)


def _matrix(old: int, new: int) -> np.ndarray:
    """(new, old) float64: the weight of each old point in each new one; rows sum to 1."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5  # pixel centres, align_corners=False
    first = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        point = np.clip(first + tap, 0, old - 1)  # the border is repeated
        np.add.at(matrix, (np.arange(new), point), _cubic(np.abs(centre - first - tap), _A))
    return matrix


def _antialiased_matrix(old: int, new: int) -> np.ndarray:
    """The same with a filter as wide as the new points are apart, cut off at the border."""
    scale = old / new
    width = max(scale, 1.0)
    distance = (np.arange(new)[:, None] + 0.5) * scale - (np.arange(old)[None] + 0.5)
    matrix = _cubic(np.abs(distance) / width, _A_ANTIALIAS)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Weight of a point at distance `x`."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
