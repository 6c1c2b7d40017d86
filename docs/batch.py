"""Draws the way of one batch through the code: `python docs/batch.py` writes docs/batch.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# Where it happens: (file below vitcls/, what it does), in the order of a step.
STOPS = {
    "host": [
        ("data/order.py", "(seed, step)\n-> examples"),
        ("data/sources/split.py", "index -> bytes,\nlabel"),
        ("data/images.py", "decode, crop:\nuint8 (H, W, 3)"),
        ("data/loader.py", "rows -> batch,\nahead"),
        ("step/sharding.py", "batch ->\ndevices"),
    ],
    "devices": [
        ("augment/prepare.py", "augment, mix,\nnormalise"),
        ("models/vit.py", "pixels ->\nlogits (B, K)"),
        ("step/losses.py", "one value\nper image"),
        ("step/train_step.py", "gradients,\nupdate, metrics"),
        ("logs/writers.py", "on the host,\none step late"),
    ],
}


def main() -> None:
    """Draws and saves the picture."""
    figure, axes = plt.subplots(figsize=(13.2, 3.4))
    for row, (where, stops) in enumerate(STOPS.items()):
        y = -1.5 * row
        axes.text(-1.1, y, where, ha="right", va="center", fontsize=10, weight="bold")
        for column, (path, text) in enumerate(stops):
            x = 2.4 * column
            axes.text(
                x, y, f"{path}\n{text}", ha="center", va="center", fontsize=9, linespacing=1.4,
                bbox={"boxstyle": "round,pad=0.5", "facecolor": "#eef3fa", "edgecolor": "#4a6fa5"},
            )  # fmt: skip
            if column:
                arrow = {"arrowstyle": "->", "color": "#4a6fa5"}
                axes.annotate("", (x - 0.95, y), (x - 1.47, y), arrowprops=arrow)
    arrow = {"arrowstyle": "->", "color": "#4a6fa5"}
    axes.annotate("", (0, -1.1), (9.6, -0.4), arrowprops=arrow)
    axes.set(xlim=(-2.2, 10.7), ylim=(-2.1, 0.6))
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
