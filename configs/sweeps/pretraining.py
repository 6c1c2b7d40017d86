"""Compares the quick start with the same network from random weights, five seeds each.

  python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/pretraining.py \
    --workdir=runs/pretraining
  python -m vitcls.analysis.compare runs/pretraining --output=runs/compared
  python -m vitcls.analysis.results docs/results --add=runs/pretraining

With one seed both networks see the same images, in the same order, for the same number of steps.
The recipe's own seed, 0, is not among them, so that a run of the recipe is a new sample.
"""

from launch.space import Fields, grid


def get_sweep() -> list[Fields]:
    """See the module."""
    return grid({"train.seed": range(1, 6), "config": ["init=pretrained", "init=scratch"]})
