"""Finds learning rate and weight decay for a recipe, three seeds each.

  python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/lr_wd.py \
    --workdir=runs/sweep

The rates are for AdamW on a small network. For SGD, or a large ViT, copy the file and change them.
"""

from launch.space import Fields, grid, seeds


def get_sweep() -> list[Fields]:
    """See the module."""
    pairs = grid({"optim.lr": [3e-4, 1e-3, 3e-3], "optim.weight_decay": [0.0, 0.05]})
    return seeds(pairs, 3)
