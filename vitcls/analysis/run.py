"""Reads the workdir of a run, also of one that was killed and is incomplete."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls.analysis import predictions
from vitcls.config.fields import default_config
from vitcls.config.parse import flatten
from vitcls.decision import kept
from vitcls.errors import UserError
from vitcls.folders.workdir import Workdir
from vitcls.provenance.saved_config import restore_config


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a workdir; missing parts are empty.

    Attributes:
      workdir: The folder.
      config: `config.json` as nested dicts.
      manifest: `manifest.json`.
      results: `results.json`.
      history: The lines of `metrics.jsonl`, in file order.
      splits: Predictions by split name, those of `data.eval_splits` first.
      decision: `model/decision.json`, if it is of the evaluated weights.
      class_names: The name of each class, in the order of the labels; empty if unknown.
      problems: What is missing or unreadable, a sentence each.
    """

    workdir: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    history: list[dict[str, Any]]
    splits: dict[str, predictions.Predictions]
    class_names: tuple[str, ...]
    problems: list[str]
    decision: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def select_split(self) -> str:
        """The split on which the checkpoint was chosen; empty: none."""
        return _group(self.config, "eval").get("select_split") or ""

    @property
    def is_finished(self) -> bool:
        """Whether it trained to its end and evaluated."""
        return "splits" in self.results


def read_run(workdir: Path) -> Run:
    """Reads all that a workdir has.

    Raises:
      UserError: The folder is not a workdir.
    """
    files = Workdir(workdir)
    parts = (files.config, files.manifest, files.metrics, files.results, files.predictions)
    if not any(part.exists() for part in parts):
        names = ", ".join(part.name for part in parts)
        raise UserError(
            f"{workdir} is not a workdir: it has none of {names}. Name the folder that was given "
            "to vitcls.main as --workdir."
        )
    problems: list[str] = []
    config = _read_json(files, files.config, problems)
    results = _read_json(files, files.results, problems)
    if "splits" not in results and files.checkpoints.exists():
        problems.append(
            "The run has not ended: final results are missing. Run its command again to resume it."
        )
    found = _read_predictions(workdir, config, problems)
    names = _class_names(_read_json(files, files.model / "config.json", problems))
    num_classes = {one.logits.shape[1] for one in found.values()}
    if names and num_classes - {len(names)}:
        problems.append(
            f"model/config.json names {len(names)} classes, but the predictions have "
            f"{', '.join(map(str, sorted(num_classes)))}: classes are shown by number."
        )
        names = ()
    return Run(
        workdir=workdir,
        config=config,
        manifest=_read_json(files, files.manifest, problems),
        results=results,
        history=_read_history(files.metrics, problems),
        splits=found,
        class_names=names,
        problems=problems,
        decision=_read_decision(workdir, results, problems),
    )


def _read_decision(workdir: Path, results: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    path = Workdir(workdir).decision
    if not path.is_file():
        return {}
    try:
        content = kept.read(path)
    except UserError as error:
        problems.append(str(error))
        return {}
    return content if content.get("step") == results.get("selected_step") else {}


def _group(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _read_json(files: Workdir, path: Path, problems: list[str]) -> dict[str, Any]:
    name = path.relative_to(files.path).as_posix()
    if not path.is_file():
        # `read_run` says more about missing results.
        if path != files.results:
            problems.append(f"{name} is missing.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{name} is not a JSON object.")
        return {}
    return content


def _read_history(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        problems.append(f"{path.name} is missing, so learning curves cannot be drawn.")
        return []
    lines, num_bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
            lines.append({**content, "step": int(content["step"])})
        except (ValueError, TypeError, KeyError):
            num_bad += 1
    if num_bad:
        problems.append(f"{path.name}: {num_bad} lines are cut or damaged, and left out.")
    return lines


def _read_predictions(
    workdir: Path, config: dict[str, Any], problems: list[str]
) -> dict[str, predictions.Predictions]:
    first = [name for name in _group(config, "data").get("eval_splits") or () if name]
    found = {}
    there = predictions.split_names(workdir)
    select = _group(config, "eval").get("select_split")
    for name in sorted(there, key=lambda name: (name not in first, name == select)):
        try:
            found[name] = predictions.read_predictions(workdir, name)
        except UserError as error:
            problems.append(str(error))
    if not there:
        problems.append("Predictions are missing: metrics by image and class need them.")
    return found


def _class_names(model_config: dict[str, Any]) -> tuple[str, ...]:
    table = model_config.get("id2label")
    if not isinstance(table, dict) or set(table) != {str(k) for k in range(len(table))}:
        return ()
    return tuple(str(table[str(k)]) for k in range(len(table)))


def changed_fields(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{"optim.lr": (value, default)}` for the fields that differ from the defaults.

    The default of a field that this version lacks is None.
    """
    # Through JSON: tuples become lists, as they are in the file.
    defaults = flatten(ConfigDict(json.loads(json.dumps(default_config().to_dict()))))
    values = flatten(ConfigDict(config))
    return {
        name: (value, defaults.get(name))
        for name, value in values.items()
        if value != defaults.get(name)
    }


def restored_config(config: dict[str, Any]) -> ConfigDict:
    """The config as training takes it, for the devices of this machine.

    Raises:
      Exception: Of several types, if the config comes from another version.
    """
    restored = restore_config(config)
    restored.update({"mesh": {"data": -1, "fsdp": 1}, "data": {"cache": "", "num_workers": 0}})
    restored.train.micro_batch = None
    return restored
