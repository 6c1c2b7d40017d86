"""The ingredients of a soup: checkpoints of one network, their start, and images to choose on."""

import dataclasses
import glob
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.data import sources
from vitcls.data.sources.division import DIVISIONS
from vitcls.errors import UserError
from vitcls.files import read_json
from vitcls.folders.workdir import Workdir
from vitcls.models.vit_config import HEADS
from vitcls.pretrained.run import find_run
from vitcls.provenance import seen
from vitcls.provenance.saved_config import restore_config
from vitcls.run.splits import open_splits

PyTree = Any
log = logging.getLogger("vitcls")

_MAX_SHOWN = 8  # differences in a message


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One checkpoint.

    Attributes:
      name: The checkpoint for `pretrained.load`, with a fixed step or revision.
      location: The same checkpoint on this machine, so that the hub is not asked again.
      network: The network's config.
      processor: Prepares its images and names its classes.
      workdir: The run's workdir; None for other checkpoints.
      step: The run's training step; None for other checkpoints.
    """

    name: str
    location: str | Path
    network: pretrained.Config
    processor: pretrained.Processor
    workdir: Path | None = None
    step: int | None = None

    def read(self) -> PyTree:
        """Reads the weights, float32 numpy arrays; a run's averaged ones if there are any."""
        return pretrained.load(self.location)[1]

    def run_config(self) -> ConfigDict | None:
        """The run's config, in which newer fields have their defaults; None without a run."""
        saved = None if self.workdir is None else _read_json(Workdir(self.workdir).config)
        return None if saved is None else restore_config(saved)

    def manifest(self) -> dict[str, Any]:
        """The run's manifest; empty if there is none."""
        found = None if self.workdir is None else _read_json(Workdir(self.workdir).manifest)
        return found or {}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return read_json(path, remedy="put a sound copy there, or leave this checkpoint out")


def find(references: str) -> list[Ingredient]:
    """Finds the checkpoints that `--checkpoints` names.

    Args:
      references: Separated by commas. Each is a checkpoint for `pretrained.load`; `DIR@all`, every
        checkpoint that a run keeps; or a pattern of folders, `runs/*`, with or without an @ part.

    Raises:
      UserError: There is none, one is named twice, or they are not all the same network.
    """
    found = [
        ingredient
        for reference in filter(None, map(str.strip, references.split(",")))
        for name in _match(reference)
        for ingredient in _find(name)
    ]
    if not found:
        raise UserError(f"--checkpoints={references!r} names no checkpoint. Try --help.")
    names = [ingredient.name for ingredient in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--checkpoints={references} names {twice[0]} twice, so it would count twice; name "
            "every checkpoint once."
        )
    for other in found[1:]:
        _check_same(found[0], other)
    _warn_of_starts(found)
    return found


def _match(reference: str) -> list[str]:
    """The folders that a pattern matches, with its @ part; other references unchanged."""
    is_folder = Path(reference).expanduser().is_dir()
    if is_folder or not glob.has_magic(reference) or find_run(reference) is not None:
        return [reference]
    pattern, which = re.fullmatch(r"(.*?)(@[^@/]*)?", reference).groups(default="")
    folders = sorted(filter(os.path.isdir, glob.glob(os.path.expanduser(pattern), recursive=True)))
    if not folders:
        raise UserError(f"--checkpoints: the pattern {reference!r} matches no folder.")
    return [folder + which for folder in folders]


def _find(name: str) -> list[Ingredient]:
    run = find_run(name)
    if run is None:
        files = pretrained.find(name)
        fixed = name.partition("@")[0] + f"@{files.revision}" if files.revision else name
        return [Ingredient(fixed, files.directory, *pretrained.read_config(files))]
    config, processor = pretrained.read_json(run.model, tensors=None)
    checkpoints = [(f"{run.directory}@{step}", step) for step in run.steps()]
    return [
        Ingredient(name, name, config, processor, run.directory, step) for name, step in checkpoints
    ]


def _check_same(one: Ingredient, other: Ingredient) -> None:
    lines = _differences(_facts(one.network, one.processor), _facts(other.network, other.processor))
    if lines:
        raise UserError(
            f"{one.name} and {other.name} are not the same network with the same classes in the "
            f"same order and the same preprocessing:\n{lines}\nWeights can be averaged only where "
            "they mean the same; leave one of the two out."
        )


def _facts(network: pretrained.Config, processor: pretrained.Processor) -> dict[str, Any]:
    facts = dataclasses.asdict(processor)
    names = facts.pop("id2label")
    facts |= {f"class {index}": name for index, name in names.items()}
    return dataclasses.asdict(network) | facts


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    fields = [field for field in one | other if one.get(field) != other.get(field)]
    lines = [f"  {field}: {one.get(field)}, {other.get(field)}" for field in fields[:_MAX_SHOWN]]
    return "\n".join(lines + (["  ..."] if len(fields) > _MAX_SHOWN else []))


def _warn_of_starts(found: list[Ingredient]) -> None:
    """Warns if runs began from different weights; random ones count as different."""
    starts = {}
    for one in found:
        if manifest := one.manifest():
            sha256 = (manifest["pretrained"] or {}).get("sha256", one.workdir)
            starts.setdefault(str(sha256), one.name)
    if len(starts) > 1:
        log.warning(
            "%s began from different weights. Only networks that were fine-tuned from the same "
            "weights can be expected to have a good mean.", " and ".join(starts.values()),
        )  # fmt: skip


def read_start(
    ingredient: Ingredient, end: PyTree, *, checkpoint: str = ""
) -> tuple[PyTree, dict[str, Any]]:
    """Reads the weights that fine-tuning began with.

    Position embeddings are resized to the image size of the fine-tuned network. The head is the
    pretrained one if fine-tuning kept it, otherwise the fine-tuned one.

    Args:
      ingredient: The fine-tuned checkpoint.
      end: Its weights.
      checkpoint: The pretrained checkpoint; "": the one in the run's config and manifest.

    Returns:
      The weights, and their record in `soup.json`.

    Raises:
      UserError: The checkpoint is unknown or missing, has changed since, or is another network.
    """
    config = ingredient.run_config()
    source, sha256 = checkpoint, None
    if not source:
        source, sha256 = _recorded_start(ingredient, config)
    allow_pickle = config is not None and config.model.allow_pickle
    has_new_head = config is not None and config.model.head == "new"
    num_classes = ingredient.network.num_classes
    try:
        if sha256 and pretrained.find(source, allow_pickle=allow_pickle).sha256() != sha256:
            raise UserError("Its files changed since the run began, see manifest.json.")
        model, start, processor = pretrained.load(
            source,
            num_classes=0 if has_new_head else num_classes,
            image_size=ingredient.network.image_size,
            allow_pickle=allow_pickle,
        )
    except UserError as error:
        raise UserError(
            f"The pretrained {source!r} of {ingredient.name} cannot be used: {error} Name the "
            "checkpoint that fine-tuning began from with --pretrained."
        ) from error
    network = dataclasses.replace(model.config, num_classes=num_classes)
    lines = _differences(dataclasses.asdict(network), dataclasses.asdict(ingredient.network))
    if lines:
        raise UserError(
            f"The pretrained {source!r} and {ingredient.name} are not the same network:\n{lines}\n"
            "Name the checkpoint that fine-tuning began from with --pretrained."
        )
    keeps_head = processor.id2label == ingredient.processor.id2label
    if config is not None:
        keeps_head = not has_new_head
    if not keeps_head:
        heads = {name: end["params"][name] for name in HEADS if name in end["params"]}
        start = start | {"params": start["params"] | heads}
        log.info("The head is the fine-tuned one at both ends.")
    return start, {"checkpoint": source, "head": "pretrained" if keeps_head else "fine-tuned"}


def _recorded_start(
    ingredient: Ingredient, config: ConfigDict | None
) -> tuple[str, dict[str, str] | None]:
    """The checkpoint that a run's files name, and the hashes of its files if they are known."""
    if config is None or not config.model.pretrained:
        why = "is not a run" if config is None else "began from random weights (model.arch)"
        raise UserError(
            f"--how=wise goes from the pretrained weights to {ingredient.name}, which {why}. Name "
            "the pretrained checkpoint with --pretrained."
        )
    recorded = ingredient.manifest().get("pretrained")
    if not recorded:
        return config.model.pretrained, None
    source, revision = recorded["source"], recorded["revision"]
    return f"{source.partition('@')[0]}@{revision}" if revision else source, recorded["sha256"]


def open_selection(
    ingredients: Iterable[Ingredient],
    *,
    source: str = "",
    split: str = "",
    data_dir: str = "",
    allow_eval_split: bool = False,
) -> tuple[str, sources.Split]:
    """Opens the images to choose on, which no run was trained on or is measured by.

    Runs on other sources than `source` are compared if `seen.find` knows that the data are the
    same.

    Args:
      ingredients: The checkpoints.
      source: Data set; "": the runs' own.
      split: A split of the data set; "": the one that the runs chose their best checkpoints on.
        "holdout": the images that a run held out of its training images.
      data_dir: Folder of prepared data sets; "": where the runs had them.
      allow_eval_split: Whether images of the runs' data.eval_splits may be among them.

    Returns:
      The data set and its split.

    Raises:
      UserError: The data set is unknown, or a run was trained on or is measured by an image.
    """
    # Checkpoints of one run, and runs that differ in other fields only, have the same images.
    runs = {}
    for ingredient in ingredients:
        config = ingredient.run_config()
        if config is not None:
            config.data.cache = ""
            config.data.data_dir = data_dir or config.data.data_dir
            key = config.data.to_json(), config.train.seed, config.eval.select_split
            runs.setdefault(key, (ingredient, config))
    known = [config for _, config in runs.values()]
    source = source or _only("--data", {config.data.source for config in known})
    elsewhere = [pair for pair in runs.values() if pair[1].data.source != source]
    runs = [pair for pair in runs.values() if pair[1].data.source == source]
    split = split or _only("--split", {config.eval.select_split for _, config in runs})
    opened = [
        (ingredient, config, *open_splits(config, is_continued=True)) for ingredient, config in runs
    ]
    selection = next((held[split] for *_, held in opened if split in held), None)
    if selection is None:
        data_dir = data_dir or next((config.data.data_dir for _, config in runs), "")
        division = next((config.data.division for _, config in runs), "") or DIVISIONS[0]
        selection = sources.open_split(source, split, data_dir=data_dir or None, division=division)
    for ingredient, config in elsewhere:
        measures = () if allow_eval_split else config.data.eval_splits
        _check_elsewhere(ingredient, selection, source, data_dir, measures)
    chosen = {selection.id(index) for index in range(len(selection))}
    for ingredient, config, train, evaluated in opened:
        _check_same_data(ingredient, train)
        if shared := _shared(chosen, train):
            raise UserError(
                f"{len(shared)} of the {len(chosen)} images of {split!r} that would choose, such "
                f"as {shared[0]}, were trained on by {ingredient.name}. Name a --split that no run "
                "was trained on, or use --how=uniform. Hold-outs depend on train.seed: train runs "
                "for a soup with the same one, or with a validation split (eval.select_split)."
            )
        for name in config.data.eval_splits:
            if not allow_eval_split and _shared(chosen, evaluated[name]):
                raise UserError(
                    f"--split={split} shares images with {name!r} of data.eval_splits of "
                    f"{ingredient.name}: images that choose weights cannot measure them. Leave out "
                    "--split to choose on the split that the runs chose on; or, if you have other "
                    "images to measure with, add --allow_eval_split."
                )
    return source, selection


def _check_elsewhere(
    ingredient: Ingredient,
    selection: sources.Split,
    source: str,
    data_dir: str,
    measures: Iterable[str],
) -> None:
    """Refuses images of a run whose data are the same under another name, e.g. moved.

    Args:
      ingredient: A checkpoint of the run.
      selection: The images that would choose.
      source: Their data set.
      data_dir: Folder of all tfds data.
      measures: The run's splits that may not choose.
    """
    known = seen.find(ingredient.workdir, source, data_dir=data_dir or None)
    if known is None:
        return
    shared = known.num_trained_on(selection, source)
    what = "trained on by"
    if not shared:
        shared = sum(known.num_evaluated(selection, source, name) for name in measures)
        what = "in data.eval_splits of"
    if shared:
        raise UserError(
            f"{shared} of the {len(selection)} images of {selection.name!r} that would choose were "
            f"{what} {ingredient.name}, whose data have another path. Name a --split of other "
            "images, or use --how=uniform."
        )


def _only(flag: str, values: set[str]) -> str:
    if len(values) == 1 and "" not in values:
        return values.pop()
    listed = f"the runs have {sorted(values)}" if values else "no checkpoint is a run that names it"
    raise UserError(f"{flag} is missing: name the images to choose on; {listed}.")


def _shared(chosen: set[str], split: sources.Split) -> list[str]:
    ids = (split.id(index) for index in range(len(split)))
    return [name for name in ids if name in chosen]


def _check_same_data(ingredient: Ingredient, train: sources.Split) -> None:
    recorded = ingredient.manifest().get("data", {}).get(train.name, {})
    if recorded.get("fingerprint", train.fingerprint) != train.fingerprint:
        raise UserError(
            f"The training data of {ingredient.name} ({train.name}) has changed: files or labels "
            "differ, so the images that it held out are unknown. Restore the data, or name other "
            "data with --data and --split."
        )
