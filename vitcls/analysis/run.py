"""What a run left in its workdir, whole or in part: a run that was killed is worth reading, too."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls.analysis import predictions
from vitcls.config.fields import default_config
from vitcls.config.parse import flatten
from vitcls.errors import UserError
from vitcls.provenance.saved_config import restore_config

_FILES = ("config.json", "manifest.json", "metrics.jsonl", "results.json", "predictions")


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir, read; what it lacks is empty.

    Attributes:
      workdir: Its folder.
      config: As nested dicts, see `config.json`.
      manifest: See `manifest.json`.
      results: See `results.json`.
      history: The lines of `metrics.jsonl`, in the order they were written.
      splits: Predictions by the name of their split, first those of `data.eval_splits`.
      class_names: One for every class, in the order of the labels; empty: they are not known.
      problems: What is missing or cannot be read, a sentence each.
    """

    workdir: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    history: list[dict[str, Any]]
    splits: dict[str, predictions.Predictions]
    class_names: tuple[str, ...]
    problems: list[str]

    @property
    def select_split(self) -> str:
        """The split that chose the checkpoint; empty: none did."""
        return _group(self.config, "eval").get("select_split") or ""

    @property
    def is_finished(self) -> bool:
        """Whether it trained to its end and evaluated."""
        return "splits" in self.results


def read_run(workdir: Path) -> Run:
    """Reads all there is.

    Raises:
      UserError: It is no workdir of a run.
    """
    if not any((workdir / name).exists() for name in _FILES):
        raise UserError(
            f"{workdir} is no workdir of a run: it has none of {', '.join(_FILES)}. Name the "
            "folder given to vitcls.main as --workdir."
        )
    problems: list[str] = []
    config = _read_json(workdir / "config.json", problems)
    results = _read_json(workdir / "results.json", problems)
    if "splits" not in results and (workdir / "checkpoints").exists():
        problems.append(
            "The run has not ended: there are no final results. Its command, run again, continues "
            "it."
        )
    found = _read_predictions(workdir, config, problems)
    names = _class_names(_read_json(workdir / "model" / "config.json", problems))
    num_classes = {one.logits.shape[1] for one in found.values()}
    if names and num_classes - {len(names)}:
        problems.append(
            f"model/config.json names {len(names)} classes, the predictions are of "
            f"{', '.join(map(str, sorted(num_classes)))}: classes are shown by number."
        )
        names = ()
    return Run(
        workdir=workdir,
        config=config,
        manifest=_read_json(workdir / "manifest.json", problems),
        results=results,
        history=_read_history(workdir / "metrics.jsonl", problems),
        splits=found,
        class_names=names,
        problems=problems,
    )


def _group(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    name = f"model/{path.name}" if path.parent.name == "model" else path.name
    if not path.is_file():
        if name != "results.json":  # of which more is said elsewhere
            problems.append(f"{name} is missing.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{name} holds no JSON object.")
        return {}
    return content


def _read_history(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        problems.append("metrics.jsonl is missing: there are no learning curves.")
        return []
    lines, num_bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
            lines.append({**content, "step": int(content["step"])})
        except (ValueError, TypeError, KeyError):
            num_bad += 1
    if num_bad:
        problems.append(f"metrics.jsonl: {num_bad} lines are cut or damaged and left out.")
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
            found[name] = predictions.read(workdir, name)
        except UserError as error:
            problems.append(str(error))
    if not there:
        problems.append("There are no predictions: metrics of single images and classes need them.")
    return found


def _class_names(model_config: dict[str, Any]) -> tuple[str, ...]:
    table = model_config.get("id2label")
    if not isinstance(table, dict) or set(table) != {str(k) for k in range(len(table))}:
        return ()
    return tuple(str(table[str(k)]) for k in range(len(table)))


def changed_fields(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{"optim.lr": (value, default)}` of the fields that differ from the defaults.

    The default of a field that this version does not have is None.
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
    """The config as training takes it, on whichever devices there are here.

    Raises:
      Exception: Of several types, where it is of another version.
    """
    restored = restore_config(config)
    restored.update({"mesh": {"data": -1, "fsdp": 1}, "data": {"cache": "", "num_workers": 0}})
    restored.train.micro_batch = None
    return restored
