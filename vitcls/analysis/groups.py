"""Runs found in folders, and grouped by what differs in their configs beside the seed."""

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

_SEED = "train.seed"
# One of these says that a folder is, or was to be, a run's; the last is a sweep's wish.
_FILES = ("config.json", "results.json", "asked.json")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
      name: A letter.
      fields: What makes it this group: config fields and their values.
      unusual: Those of the fields whose value is not that of most groups.
      runs: Positions of its runs, by seed.
      seeds: Theirs.
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


def find(directories: Iterable[str]) -> dict[Path, str]:
    """Returns the workdirs in folders, each with what its sweep says of it, or "".

    Args:
      directories: Workdirs, and folders of workdirs such as launch.sweep leaves.

    Raises:
      UserError: One of them is neither.
    """
    found: dict[Path, str] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise UserError(f"{directory} is no folder; name a workdir, or a folder of workdirs.")
        if _is_run(directory):
            workdirs = {directory: ""}
        else:
            states = _states(directory)
            names = {path.name for path in directory.iterdir() if _is_run(path)} | states.keys()
            workdirs = {directory / name: states.get(name, "") for name in sorted(names)}
        if not workdirs:
            raise UserError(
                f"{directory} is neither the workdir of a run nor a folder of them: there is no "
                "config.json in it, nor in a folder in it."
            )
        known = {path.resolve() for path in found}
        found |= {path: state for path, state in workdirs.items() if path.resolve() not in known}
    return found


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in _FILES)


def _states(directory: Path) -> dict[str, str]:
    """By trial of a sweep: `failed with exit code 87`, for example."""
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
    """Says what a run lacks to be compared, "" if nothing."""
    train = run.config.get("train")
    if not isinstance(train, dict) or not isinstance(train.get("seed"), int):
        return "config.json is damaged"
    if not run.is_finished:
        return "not finished"
    if run.results.get("step") != train.get("total_steps"):
        return f"at step {run.results.get('step')} of {train.get('total_steps')}"
    return ""


def group(configs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Groups runs by all fields of their configs but the seed and `config.RUN_FIELDS`.

    A field that a config of an earlier version lacks has its default. Groups are in the order of
    what makes them, numbers by size. Of runs with the same seed, which are no two samples of
    anything, a group has the first.

    Args:
      configs: As `config.json` has them.
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
