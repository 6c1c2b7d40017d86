r"""What --reject promises on the hold-out and keeps on the test split, and unknown classes.

    python -m benchmarks.rejection --output=runs/rejection

trains the quick start with three seeds on all ten digits, from the shipped weights and from random
ones, and on the digits 0 to 7. Unknown classes are 8 and 9 to the latter, and printed letters to
networks of all digits. Prints the tables of docs/decision.md. A call that is interrupted continues
where it was. About ten minutes on two CPUs.

With --other=SOURCE, such as tfds:cifar10, it also trains on that data set, with flips, and shows
those networks the digits 8 and 9.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitcls.data.sources import open_split
from vitcls.decision.rule import Rule, auroc, fit_rule, interval
from vitcls.files import folder_aside

SEEDS = (1, 2, 3)
NUM_KNOWN = 8  # digits that the third network learns
LETTERS = "ACDEFHJKMNPRTUVWXY"
# Networks -> the images of unknown classes that they are shown.
UNKNOWN = {"known": "digits/unknown", "pretrained": "letters", "other": "digits/unknown"}
TARGETS = {
    "pretrained": ({"target_precision": 0.95}, {"target_coverage": 0.9}),
    "from scratch": (
        {"target_precision": 0.8}, {"target_precision": 0.9}, {"target_coverage": 0.7},
    ),
    "other": ({"target_precision": 0.5}, {"target_coverage": 0.5}),
}  # fmt: skip
CONFIGS = {
    "pretrained": "configs/quickstart.py",
    "from scratch": "configs/quickstart.py:init=scratch",
}

Arrays = tuple[np.ndarray, np.ndarray]  # labels (N,), logits (N, K)


def train(workdir: Path, config: str, *flags: str) -> Path:
    """Trains, continues or finds a run; returns its folder."""
    command = [sys.executable, "-m", "vitcls.main", f"--config={config}", f"--workdir={workdir}"]
    subprocess.run([*command, *flags], check=True)
    return workdir


def write_digits(folder: Path) -> None:
    """Writes 0 to 7 as FOLDER/known/SPLIT/CLASS/*.png, and all 8 and 9 as unknown/*.png."""
    with folder_aside(folder) as aside:
        for name in ("train", "test"):
            split = open_split("digits", name)
            for index in range(len(split)):
                image, label = split.image(index)
                path = aside / "known" / name / split.class_names[label] / f"{index}.png"
                if label >= NUM_KNOWN:
                    path = aside / "unknown" / f"{name}-{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)


def write_letters(folder: Path) -> None:
    """Writes printed capitals that resemble no digit, 10 of each, turned by up to 15 degrees."""
    rng = np.random.default_rng(0)
    with folder_aside(folder) as aside:
        for letter in LETTERS:
            for number in range(10):
                image = Image.new("L", (64, 64))
                font = ImageFont.load_default(int(rng.integers(48, 64)))
                ImageDraw.Draw(image).text((32, 32), letter, fill=255, font=font, anchor="mm")
                image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
                image.resize((8, 8), Image.Resampling.BOX).save(aside / f"{letter}{number}.png")


def logits_of(run: Path, images: Path) -> np.ndarray:
    """Returns the logits for images of unknown classes; they are computed once."""
    output = run / f"{images.name}.npz"
    if not output.exists():
        command = [sys.executable, "-m", "vitcls.predict", f"--checkpoint={run}"]
        subprocess.run([*command, f"--images={images}", f"--output={output}"], check=True)
    with np.load(output) as arrays:
        return arrays["logits"]


def read(path: Path) -> Arrays:
    """Returns the predictions for a split."""
    with np.load(path) as arrays:
        return arrays["labels"], arrays["logits"]


def promised_and_found(run: Path, targets: dict[str, float]) -> tuple[Rule, dict, dict]:
    """Returns a rule from a run's hold-out, and its measures there and on the test split."""
    hold_out, test = (read(run / "predictions" / f"{name}.npz") for name in ("holdout", "test"))
    rule = fit_rule(*hold_out, **targets)
    return rule, rule.measure(*hold_out), rule.measure(*test)


def row(name: str, seed: int, targets: dict[str, float], run: Path) -> str:
    """Returns a line of the first table."""
    rule, promised, found = promised_and_found(run, targets)
    ((target, value),) = targets.items()
    cells = [name, str(seed), f"{target.removeprefix('target_')} {value:g}"]
    cells += [f"{rule.temperature:.2f}", "-" if rule.threshold is None else f"{rule.threshold:.3f}"]
    cells += [_cell(one[key]) for key in ("coverage", "precision") for one in (promised, found)]
    return f"| {' | '.join(cells)} |"


def _cell(one: dict[str, Any]) -> str:
    ends = f"{100 * one['low']:.1f} to {100 * one['high']:.1f}"
    return "-" if one["value"] is None else f"{100 * one['value']:.1f} ({ends})"


def unknown_rows(run: Path, unknown: np.ndarray, name: str, seed: int) -> list[str]:
    """Returns the lines of the second table: one for each score."""
    hold_out, test = (read(run / "predictions" / f"{name}.npz") for name in ("holdout", "test"))
    lines = []
    for score in ("probability", "energy"):
        rule = fit_rule(*hold_out, target_coverage=0.95, score=score)
        found = rule.measure(*test)
        rejected = interval(int((~rule.is_answered(unknown)).sum()), len(unknown))
        areas = [auroc(rule.scores(known[1]), rule.scores(unknown)) for known in (hold_out, test)]
        cells = [name, str(seed), score, *(f"{area:.3f}" for area in areas)]
        cells += map(_cell, (found["coverage"], found["precision"], rejected))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Trains what is missing, then prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--other", default="", help="data source whose networks see the digits")
    args = parser.parse_args()
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "digits").exists():
        write_digits(folder / "digits")
    if not (folder / "letters").exists():
        write_letters(folder / "letters")
    flags = {
        "pretrained": [],
        "known": [f"--config.data.source=folder:{folder.absolute()}/digits/known"],
        "from scratch": [],
    }
    if args.other:
        flags["other"] = [f"--config.data.source={args.other}", "--config.augment.flip=True"]
    runs_of = {}
    for name, own in flags.items():
        workdirs = {seed: folder / f"{name.replace(' ', '_')}-{seed}" for seed in SEEDS}
        config = CONFIGS.get(name, CONFIGS["pretrained"])
        runs_of[name] = [
            train(workdir, config, f"--config.train.seed={seed}", *own)
            for seed, workdir in workdirs.items()
        ]
    lines = [
        row(name, seed, target, run)
        for name, targets in TARGETS.items()
        for target in targets
        # Networks of another data set exist with --other only.
        for seed, run in enumerate(runs_of.get(name, ()), SEEDS[0])
    ]
    unknown_lines = []
    for name, images in UNKNOWN.items():
        for seed, run in enumerate(runs_of.get(name, ()), SEEDS[0]):
            unknown_lines += unknown_rows(run, logits_of(run, folder / images), name, seed)
    print(
        "| network | seed | target | temperature | threshold | coverage promised | found | "
        "precision promised | found |\n|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))
    print(
        "\n| network | seed | score | area, hold-out | area, test | coverage, test | "
        "precision, test | unknown rejected |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(unknown_lines))


if __name__ == "__main__":
    main()
