"""Compares the ways to train on imbalanced classes, three seeds each.

  python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/imbalance.py \
    --workdir=runs/imbalance --config.data.source=folder:$DATA --config.data.long_tail=50 \
    --config.augment.flip=True --config.eval.select_split= --config.train.total_epochs=0 \
    --config.train.total_steps=200 \
    --metrics=test/balanced_accuracy,test/head_accuracy,test/medium_accuracy,test/tail_accuracy

docs/recipes.md has a table of the results. The first trial leaves the classes as they are.
"""

from launch.space import Fields, seeds


def get_sweep() -> list[Fields]:
    """See the module."""
    ways = [
        {},
        {"loss.logit_adjustment": 1.0},
        {"loss.class_weights": "balanced"},
        {"loss.class_weights": "effective", "loss.beta": 0.99},
        {"data.sampling": "sqrt"},
        {"data.sampling": "balanced"},
        {"loss.name": "focal"},
        {"loss.name": "sigmoid"},
        {"loss.name": "sigmoid", "loss.class_weights": "balanced"},
    ]
    return seeds(ways, 3)
