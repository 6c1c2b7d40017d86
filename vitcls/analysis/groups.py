"""Finds runs in folders, and groups those whose configs differ in nothing but the seed."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vitcls.analysis.run import Run
from vitcls.config.fields import RUN_FIELDS, default_config
from vitcls.config.parse import flatten
from vitcls.errors import UserError
from vitcls.folders.workdir import Workdir, is_finished

_SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
      name: A letter.
      fields: The config fields that differ between groups, with the values of this one.
      unusual: Those of the fields whose value most groups do not share.
      runs: Positions of its runs, ordered by seed.
      seeds: The seeds of the runs.
    """

    name: str
    fields: dict[str, Any]
    unusual: dict[str, Any]
    runs: list[int]
    seeds: list[int]

    @property
    def label(self) -> str:
        """Such as `A (optim.lr=0.001)`."""
        if not self.fields:
            return self.name
        return f"{self.name} ({describe(self.unusual) or 'the usual values'})"


def describe(fields: Mapping[str, Any]) -> str:
    """Such as `optim.lr=0.001, optim.weight_decay=0.1`."""
    return ", ".join(f"{field}={_short(value)}" for field, value in fields.items())


def find_workdirs(directories: Iterable[str]) -> dict[Path, str]:
    """Returns the workdirs in folders, each with its state in the sweep, or "".

    Args:
      directories: Workdirs, and folders of workdirs such as launch.sweep makes.

    Raises:
      UserError: One of them is neither.
    """
    found: dict[Path, str] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise UserError(f"{directory} is not a folder; name a workdir or a folder of workdirs.")
        if _is_run(directory):
            workdirs = {directory: ""}
        else:
            states = _states(directory)
            names = {path.name for path in directory.iterdir() if _is_run(path)} | states.keys()
            workdirs = {directory / name: states.get(name, "") for name in sorted(names)}
        if not workdirs:
            raise UserError(
                f"{directory} is neither a workdir nor a folder of workdirs: there is no "
                "config.json in it, nor in a folder in it."
            )
        known = {path.resolve() for path in found}
        found |= {path: state for path, state in workdirs.items() if path.resolve() not in known}
    return found


def _is_run(path: Path) -> bool:
    workdir = Workdir(path)
    # launch.sweep writes the last one before a run begins.
    return any(file.is_file() for file in (workdir.config, workdir.results, path / "asked.json"))


def _states(directory: Path) -> dict[str, str]:
    """The state of each trial of a sweep, such as `failed with exit code 87`."""
    try:
        trials = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))["trials"]
        return {
            Path(trial["name"]).name: trial["state"]
            + (f" with exit code {trial['exit_code']}" if trial["exit_code"] else "")
            for trial in trials
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def why_unfinished(run: Run) -> str:
    """Returns what a run lacks to be compared, "" if nothing."""
    train = run.config.get("train")
    if not isinstance(train, dict) or not isinstance(train.get("seed"), int):
        return "config.json is damaged"
    if not run.is_finished:
        return "not finished"
    if not is_finished(run.results, train.get("total_steps")):
        return f"at step {run.results.get('step')} of {train.get('total_steps')}"
    return ""


def group_by_config(configs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Groups runs by all fields of their configs except the seed and `config.RUN_FIELDS`.

    A field that an older config lacks has its default. Groups are sorted by the values of their
    fields, numbers by size. A group has one run per seed, the first: two runs with one seed are not
    independent samples.

    Args:
      configs: The contents of `config.json`.
    """
    defaults = _flat(default_config().to_dict())
    flat = [defaults | _flat(config) for config in configs]
    names = sorted(set().union(*flat) - {_SEED, *RUN_FIELDS})
    keys = [{name: json.dumps(values.get(name)) for name in names} for values in flat]
    differing = [name for name in names if len({key[name] for key in keys}) > 1]
    members: dict[tuple[str, ...], list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(tuple(key[name] for name in differing), []).append(i)
    groups = []
    for key in sorted(members, key=lambda key: [_order(json.loads(value)) for value in key]):
        by_seed = {flat[i][_SEED]: i for i in reversed(members[key])}
        seeds = sorted(by_seed)
        runs = [by_seed[seed] for seed in seeds]
        fields = {name: json.loads(value) for name, value in zip(differing, key, strict=True)}
        unusual = {
            name: fields[name]
            for position, (name, value) in enumerate(zip(differing, key, strict=True))
            if 2 * sum(other[position] == value for other in members) <= len(members)
        }
        groups.append(Group(_letter(len(groups)), fields, unusual, runs, seeds))
    return groups


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    # Through JSON: tuples become lists, as they are in the file.
    return flatten(ConfigDict(json.loads(json.dumps(config))))


def _order(value: Any) -> tuple:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not is_number, value if is_number else 0, str(value))


def _letter(position: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    before, last = divmod(position, 26)
    return (_letter(before - 1) if before else "") + chr(ord("A") + last)


def _short(value: Any, longest: int = 60) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"
