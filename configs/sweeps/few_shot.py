"""Compares pretrained and random weights, with 1, 5, 10 and all images per class, five seeds.

  python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/few_shot.py \
    --workdir=runs/few_shot --config.eval.select_split= --config.train.total_epochs=0 \
    --config.train.global_batch_size=32
  python -m benchmarks.few_shot --sweep=runs/few_shot --output=docs/few_shot.png

With one seed both networks see the same images, in the same order, for the same number of steps.
Nothing is selected: the last step counts.
"""

from launch.space import Fields, grid, seeds


def get_sweep() -> list[Fields]:
    """See the module."""
    inits = ["init=pretrained", "init=scratch"]
    few = grid({"data.per_class": [1, 5, 10], "config": inits, "train.total_steps": [100]})
    whole = grid({"data.per_class": [0], "config": inits, "train.total_steps": [200]})
    return seeds([*few, *whole], 5)
