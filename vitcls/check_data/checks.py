"""Looks at a data set before training on it, in numbers and in pictures.

K classes.
"""

import collections
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vitcls.check_data.contact_sheet import contact_sheet
from vitcls.check_data.survey import Facts, find_duplicates, survey
from vitcls.data import sources
from vitcls.data.skipped import Skipped
from vitcls.data.sources import classes
from vitcls.data.sources.files import show
from vitcls.data.sources.split import check_no_class_is_empty, num_shared
from vitcls.errors import UserError
from vitcls.logs.progress import doing
from vitcls.run.opened import Begun, open_run
from vitcls.run.program import with_fields
from vitcls.run.splits import open_splits

Report = dict[str, Any]

# An image with a shorter side, in pixels, shows hardly anything.
_TINY = 8
# Sizes of the tables and sheets.
_NUM_CLASSES_SHOWN, _NUM_TILES, _NUM_COLUMNS, _NUM_GROUPS = 40, 100, 10, 40


def check(
    source: str,
    names: Sequence[str] = (),
    *,
    data_dir: str | None = None,
    division: str = "hash",
    on_error: str = "raise",
) -> tuple[dict[str, sources.Split], Report]:
    """Decodes every image of a data set.

    Args:
      source: As `sources.open_split` takes it.
      names: Splits, the one to train on first; empty: all.
      data_dir: Folder of all tfds data.
      division: As `sources.open_split` takes it.
      on_error: What training does with images that cannot be decoded: "raise" or "skip".

    Returns:
      The splits that can be opened, by name, and the report, for JSON. It has `data`, the source;
      `splits` with the counts and the findings of each; `duplicates`; and `problems`, the reasons
      why training would fail.

    Raises:
      StorageError: An image cannot be read.
    """
    splits, problems = {}, []
    try:
        if not names:
            # Sorting is stable: "train" comes first, if there is one.
            found = sources.split_names(source, data_dir=data_dir)
            names = sorted(found, key=lambda name: name != "train")
    except UserError as error:
        problems.append(str(error))
    for name in names:
        try:
            split = sources.open_split(source, name, data_dir=data_dir, division=division)
            # This reads records, some of which may lack a label.
            split.labels()
            splits[name] = split
        except UserError as error:
            if str(error) not in problems:
                problems.append(str(error))
    num_threads = 2 * (os.cpu_count() or 1)
    facts = {name: survey(split, num_threads=num_threads) for name, split in splits.items()}
    for name, split in splits.items():
        problems += _unreadable(split, facts[name], on_error)
    if splits:
        problems += _classes(list(splits.values()), facts, on_error)
    return splits, {
        "data": source,
        "splits": {name: _describe(split, facts[name]) for name, split in splits.items()},
        "duplicates": _duplicates(splits, facts),
        "problems": problems,
    }


def _unreadable(split: sources.Split, facts: list[Facts], on_error: str) -> list[str]:
    bad = [index for index, one in enumerate(facts) if one.error]
    if not bad or (on_error == "skip" and 2 * len(bad) <= len(split)):
        return []
    return [
        f"{split.name}: {len(bad)} of {len(split)} images cannot be decoded, such as "
        f"{split.id(bad[0])}: {facts[bad[0]].error} Fix them or take them out; "
        "data.on_error='skip' trains without them, as long as fewer than half are affected."
    ]


def _classes(
    splits: list[sources.Split], facts: Mapping[str, list[Facts]], on_error: str
) -> list[str]:
    train, problems = splits[0], []
    is_left_out = on_error == "skip"
    bad = [train.id(i) for i, one in enumerate(facts[train.name]) if one.error and is_left_out]
    try:
        check_no_class_is_empty(train, without=bad)
    except UserError as error:
        problems.append(str(error))
    if np.count_nonzero(train.class_counts()) < 2:
        problems.append(f"{train.name}: images of at least two classes are needed.")
    for split in splits[1:]:
        try:
            classes.align(train, split)
        except UserError as error:
            problems.append(str(error))
        if shared := num_shared(split, train):
            problems.append(
                f"{split.name}: {shared} of its {len(split)} images are also in {train.name}, and "
                "so cannot measure what was learned from them."
            )
    return problems


def _describe(split: sources.Split, facts: list[Facts]) -> Report:
    counts = split.class_counts()
    readable = [one for one in facts if not one.error]

    def ids(chosen) -> list[str]:
        return [split.id(index) for index, one in enumerate(facts) if chosen(one)]

    return {
        "found": split.found,
        "num_examples": len(split),
        "counts": dict(zip(split.class_names, counts.tolist(), strict=True)),
        # None where a class has no images.
        "imbalance": float(counts.max() / counts.min()) if counts.min() else None,
        "width": _quantiles([one.width for one in readable]),
        "height": _quantiles([one.height for one in readable]),
        "formats": dict(collections.Counter(one.format for one in readable).most_common()),
        "modes": dict(collections.Counter(one.mode for one in readable).most_common()),
        "unreadable": [
            {"id": split.id(index), "reason": one.error}
            for index, one in enumerate(facts)
            if one.error
        ],
        "tiny": ids(lambda one: not one.error and min(one.width, one.height) < _TINY),
        "animated": ids(lambda one: one.is_animated),
    }


def _quantiles(numbers: list[int]) -> dict[str, int]:
    if not numbers:
        return {}
    values = np.percentile(numbers, [0, 5, 50, 95, 100], method="nearest")
    return dict(zip(("min", "5%", "median", "95%", "max"), values.tolist(), strict=True))


def _duplicates(
    splits: Mapping[str, sources.Split], facts: Mapping[str, list[Facts]]
) -> list[Report]:
    """Returns groups of images that show the same; harmful groups come first.

    `is_exact`: all pixels are the same, though the files may differ.
    """
    where = [(name, index) for name, split in splits.items() for index in range(len(split))]
    everything = [one for name in splits for one in facts[name]]
    labels = {
        name: [split.class_names[label] for label in split.labels().tolist()]
        for name, split in splits.items()
    }
    groups = []
    with doing("Looking for duplicates"):
        found = find_duplicates(everything)
    for group in found:
        images = [
            {
                "split": name,
                "index": index,
                "id": splits[name].id(index),
                "label": labels[name][index],
            }
            for name, index in (where[position] for position in group)
        ]
        groups.append(
            {
                "is_exact": len({everything[position].digest for position in group}) == 1,
                "across_splits": len({image["split"] for image in images}) > 1,
                "different_labels": len({image["label"] for image in images}) > 1,
                "images": images,
            }
        )
    return sorted(groups, key=lambda g: (not g["different_labels"], not g["across_splits"]))


def format_report(report: Report) -> str:
    """Returns the report as tables, for people."""
    splits = report["splits"]
    header = ("split", "images", "unreadable", "classes", "imbalance", "width", "height", "stored")
    rows = [header]
    for name, one in splits.items():
        sizes = [_range(one[side]) for side in ("width", "height")]
        imbalance = "-" if one["imbalance"] is None else f"{one['imbalance']:.1f}"
        stored = " ".join(
            f"{kind}:{num}" for kind, num in {**one["formats"], **one["modes"]}.items()
        )
        rows.append(
            (name, one["num_examples"], len(one["unreadable"]), len(one["counts"]), imbalance,
             *sizes, stored)
        )  # fmt: skip
    lines = [*_table(rows), "", *_class_table(splits), ""]
    for name, one in splits.items():
        missing = [label for label, count in one["counts"].items() if not count]
        for what, found in (
            ("classes without images", missing),
            (f"images with a side below {_TINY} pixels", one["tiny"]),
            ("animated images, of which the first frame counts", one["animated"]),
            ("unreadable", [f"{bad['id']} ({bad['reason']})" for bad in one["unreadable"]]),
        ):
            if found:
                lines.append(f"{name}: {len(found)} {what}: {show(found)}")
    lines += _duplicate_lines(report["duplicates"])
    return "\n".join([*lines, *(f"{name}: {one['found']}" for name, one in splits.items())])


def _range(quantiles: Mapping[str, int]) -> str:
    if not quantiles:
        return "-"
    low, middle, high = (quantiles[key] for key in ("min", "median", "max"))
    return f"{low}" if low == high else f"{low}..{middle}..{high}"


def _class_table(splits: Mapping[str, Report]) -> list[str]:
    """Lines with the images of each class by split; of many classes, the largest and smallest."""
    names = list(dict.fromkeys(label for one in splits.values() for label in one["counts"]))
    if len(names) > _NUM_CLASSES_SHOWN:
        names.sort(key=lambda label: -sum(one["counts"].get(label, 0) for one in splits.values()))
        half = _NUM_CLASSES_SHOWN // 2
        names = [*names[:half], "...", *names[-half:]]
    rows = [("class", *splits)]
    for label in names:
        counts = (one["counts"].get(label, "-") for one in splits.values())
        rows.append((label, *("..." if label == "..." else count for count in counts)))
    return _table(rows)


def _duplicate_lines(groups: list[Report]) -> list[str]:
    num_exact = sum(group["is_exact"] for group in groups)
    lines = [
        f"duplicates: {num_exact} groups of images with the same pixels, "
        f"{len(groups) - num_exact} with nearly the same"
    ]
    for flag, meaning in (
        ("across_splits", "across splits (evaluation sees what was trained on)"),
        ("different_labels", "with different labels (not all can be right)"),
    ):
        found = [
            " = ".join(f"{one['split']}:{one['id']} [{one['label']}]" for one in group["images"])
            for group in groups
            if group[flag]
        ]
        if found:
            lines.append(f"  {len(found)} {meaning}: {show(found)}")
    return lines


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of aligned columns: text to the left, numbers to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell!s:>{width}}" if isinstance(cell, int) else f"{cell!s:<{width}}"
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def draw_examples(splits: Mapping[str, sources.Split], report: Report) -> Image.Image:
    """Returns a sheet of examples from all splits, evenly over their classes."""
    tiles = []
    for name, split in splits.items():
        bad = {one["id"] for one in report["splits"][name]["unreadable"]}
        by_class = np.argsort(split.labels(), kind="stable")
        num_rows = max(1, _NUM_TILES // _NUM_COLUMNS // len(splits))
        num = min(len(split), num_rows * _NUM_COLUMNS)
        for index in by_class[(2 * np.arange(num) + 1) * len(split) // (2 * num)].tolist():
            if split.id(index) not in bad:
                image, label = split.image(index)
                tiles.append((image, f"{split.class_names[label]}\n{name}"))
    return contact_sheet(tiles, num_columns=_NUM_COLUMNS)


def draw_duplicates(splits: Mapping[str, sources.Split], report: Report) -> Image.Image:
    """Returns a sheet of pairs of duplicates side by side; harmful ones come first."""
    tiles = []
    for group in report["duplicates"][:_NUM_GROUPS]:
        for one in group["images"][:2]:
            image, _ = splits[one["split"]].image(one["index"])
            tiles.append((image, f"{one['label']}\n{one['split']}"))
    return contact_sheet(tiles, num_columns=8)


def check_training(config: ConfigDict, report: Report) -> None:
    """Raises the `UserError` of training, at its start or once it has seen every image.

    Args:
      config: The run's.
      report: Result of `check` for the config's data.
    """
    train, _ = open_splits(config)
    bad = [one["id"] for split in report["splits"].values() for one in split["unreadable"]]
    check_no_class_is_empty(train, without=bad)


def draw_training(config: ConfigDict) -> Image.Image:
    """Returns a sheet of `training_images`, and raises their errors."""
    return contact_sheet(training_images(config, num=_NUM_TILES), num_columns=_NUM_COLUMNS)


def training_images(
    config: ConfigDict, *, num: int, begun: Begun | None = None
) -> list[tuple[Image.Image, str]]:
    """Returns the first images as the network sees them, each with its target.

    Images that training would skip are left out.

    Args:
      config: The run's.
      num: Maximum of images. Whole batches are made for them.
      begun: What the run chose when it began, if there is one with this config.

    Raises:
      UserError: the error of training with this config at its start.
    """
    # A cache would have to be filled first, and few images need no worker processes.
    config = with_fields(config, {"data.cache": "", "data.num_workers": 0})
    run = open_run(config, begun=begun)
    config, processor, train = run.config, run.processor, run.train_split
    program = run.make_program()
    num_steps = min(-(-num // config.train.global_batch_size), config.train.total_steps)
    floor = config.loss.label_smoothing / len(train.class_names)
    tiles = []
    with tempfile.TemporaryDirectory() as folder:
        is_skipping = config.data.on_error == "skip"
        skipped = Skipped(Path(folder, "skipped")) if is_skipping else None
        batches = run.train_batches(0, skipped=skipped, total_steps=num_steps)
        for step, batch in enumerate(batches):
            images, targets, weights = jax.device_get(program.prepare(step, batch))
            pixels = (images * processor.std + np.asarray(processor.mean)) / processor.rescale
            pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
            tiles += [
                (Image.fromarray(image), _describe_target(target, train.class_names, floor))
                for image, target, weight in zip(pixels, targets, weights, strict=True)
                if weight
            ]
    return tiles[:num]


def _describe_target(target: np.ndarray, class_names: tuple[str, ...], floor: float) -> str:
    """The likeliest class of a target (K,), or two with their shares where it is a mixture.

    `floor` is what smoothing gives to every class.
    """
    first, second = np.argsort(-target, kind="stable")[:2].tolist()
    if target[second] - floor < 0.05:
        return class_names[first]
    return "\n".join(f"{target[k]:.2f} {class_names[k]}" for k in (first, second))
