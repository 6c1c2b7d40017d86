import numpy as np
import pytest
import torch

from vitcls.pretrained.positions import resize_positions


def random_positions(grid, prefix=1, dim=6):
    shape = (1, prefix + grid[0] * grid[1], dim)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((14, 14), (24, 24)),
        ((14, 14), (7, 9)),
        ((37, 37), (16, 16)),  # DINOv2: 518 pixels to 224
        ((4, 6), (5, 3)),
        ((1, 1), (3, 2)),
        ((2, 3), (1, 1)),
    ],
)
def test_equals_torch(old, new, antialias):
    positions = random_positions(old)
    grid = torch.from_numpy(positions[:, 1:].reshape(1, *old, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=new, mode="bicubic", align_corners=False, antialias=antialias
    )
    found = resize_positions(positions, old=old, new=new, antialias=antialias)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, :1], positions[:, :1])
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 2])
def test_prefix_tokens_keep_their_position(prefix):
    positions = random_positions((3, 3), prefix)
    found = resize_positions(positions, old=(3, 3), new=(4, 5))
    assert found.shape == (1, prefix + 20, 6)
    np.testing.assert_array_equal(found[:, :prefix], positions[:, :prefix])


def test_the_same_grid_changes_nothing():
    positions = random_positions((4, 5))
    found = resize_positions(positions, old=(4, 5), new=(4, 5))
    np.testing.assert_allclose(found, positions, atol=1e-6)
