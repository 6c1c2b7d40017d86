"""The trials of a sweep: what each runs, where, and how far it is."""

import dataclasses
import hashlib
import json
import re
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import commands
from vitcls import cli
from vitcls.config.checks import drop_unused
from vitcls.errors import UserError
from vitcls.files import read_json, write_json
from vitcls.folders.workdir import Workdir
from vitcls.provenance.saved_config import check_same_run

_MAX_NAME = 120  # characters; file systems take 255 bytes, and paths go on behind it
SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      fields: What makes it this trial: config fields and their values.
      workdir: Its folder.
      config: All fields, as its own command will read them.
      flags: What follows `python -m vitcls.main`, without the workdir.
    """

    fields: dict[str, Any]
    workdir: Path
    config: ConfigDict
    flags: list[str]

    @property
    def name(self) -> str:
        return self.workdir.name

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "vitcls.main", *self.flags, f"--workdir={self.workdir}"]

    def prepare(self) -> None:
        """Makes the folder, and notes what is asked for: another sweep must not take it over."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(self.workdir / "asked.json", self.config.to_dict())

    def total_steps(self) -> int | None:
        """Returns the steps it trains for; None before a run of so many epochs has counted them."""
        path, asked = self.workdir / "config.json", _read_if_sound(self.workdir / "asked.json")
        if self.config.train.total_steps or not path.exists():
            return self.config.train.total_steps or None
        # What is there may have been counted for fewer epochs.
        if asked and asked["train"]["total_epochs"] != self.config.train.total_epochs:
            return None
        saved = _read_if_sound(path) or {}
        return saved.get("train", {}).get("total_steps")

    def results(self) -> dict[str, Any] | None:
        """Returns its `results.json` once it is at the last step, else None."""
        results = _read_if_sound(self.workdir / "results.json")
        return results if results and results.get("step") == self.total_steps() else None

    def metrics(self) -> dict[str, float]:
        """Returns the newest line of training metrics, {} before the first."""
        try:
            with (self.workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(file.seek(0, 2) - 8192, 0))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                metrics = json.loads(line)
            except ValueError:  # cut by our seek, or being written
                continue
            if "train/loss" in metrics:
                return metrics
        return {}

    def last_words(self) -> str:
        """Returns the line of its log that says best why it ended."""
        try:
            log = (self.workdir / "log.txt").read_text(errors="replace")
        except OSError:
            return ""
        lines = log[log.rfind("\n$ ") + 1 :].splitlines()[1:]  # what followed the last command
        errors = [line for line in lines if line.startswith("ERROR: ")]
        return (errors or [line for line in lines if line.strip()] or [""])[-1]


def _read_if_sound(path: Path) -> dict[str, Any] | None:
    """The object in a trial's JSON file; None without one.

    One that is cut counts as none: the trial, which is started then, makes it again.
    """
    try:
        return read_json(path, remedy="") if path.exists() else None
    except UserError:
        return None


def load_sweep(path: str) -> list[dict[str, Any]]:
    """Returns what `get_sweep()` of the file returns; raises `UserError` if that is no sweep."""
    what = f"--sweep={path}"
    try:
        get_sweep = runpy.run_path(path).get("get_sweep")
        trials = get_sweep() if get_sweep else None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}.") from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{what} failed at {line.filename}, line {line.lineno}: {type(error).__name__}: {error}"
        ) from error
    if get_sweep is None:
        raise UserError(f"{what} has no function get_sweep(); see configs/sweeps/lr_wd.py.")
    if not isinstance(trials, list) or not all(isinstance(trial, dict) for trial in trials):
        raise UserError(
            f'{what}: get_sweep() must return a list of dicts such as {{"optim.lr": 1e-3}}.'
        )
    if not trials:
        raise UserError(f"{what}: get_sweep() returns no trial.")
    return trials


def make_trials(
    sweep: list[dict[str, Any]],
    config_file: str,
    overrides: list[str],
    workdir: Path,
    *,
    here: bool = True,
) -> list[Trial]:
    """Returns the trials of a sweep, all of them checked.

    Args:
      sweep: Config fields and values of each trial; "config" is the config file's argument.
      config_file: As `--config` takes it, `FILE.py` or `FILE.py:ARGUMENT`.
      overrides: `--config.FIELD=VALUE` flags that all trials get.
      workdir: The sweep's folder.
      here: Whether they will run on this machine.

    Raises:
      UserError: a trial is there twice, its config has a mistake, or its folder is another run's.
    """
    trials = {}
    for fields in sweep:
        name = _name(fields)
        if name in trials:
            raise UserError(f"Two trials of the sweep are the same: {name}.")
        for override in overrides:
            field = override.lstrip("-").partition("=")[0].removeprefix("config.")
            if field in fields:
                raise UserError(f"{override}: {field} is what the sweep varies; take one away.")
        arguments = [_config_flag(config_file, fields.get("config", "")), *overrides]
        arguments += [f"--config.{key}={fields[key]}" for key in fields if key != "config"]
        trial = Trial(fields, workdir / name, _read_config(arguments, name, here=here), arguments)
        if _read_if_sound(trial.workdir / "asked.json"):
            check_same_run(trial.config, trial.workdir / "asked.json")
        else:
            Workdir(trial.workdir).check_own()
        trials[name] = trial
    return list(trials.values())


def _config_flag(config_file: str, argument: str) -> str:
    path, _, given = config_file.partition(":")
    argument = ",".join(filter(None, [given, argument]))
    return f"--config={path}:{argument}" if argument else f"--config={path}"


def _read_config(arguments: list[str], name: str, *, here: bool) -> ConfigDict:
    """Reads the flags as `vitcls.main` will, so that what is checked is what will run."""
    parsed, argv = flags.FlagValues(), ["vitcls.main", *arguments]
    config_flags.DEFINE_config_file(
        "config", None, "", lock_config=False, accept_new_attributes=True,
        flag_values=parsed, sys_argv=argv,
    )  # fmt: skip
    try:
        parsed(argv)
        config = parsed["config"].value
        drop_unused(config, given=parsed["config"].override_values)
        commands.check(config, here=here)
    except Exception as error:  # also whatever running a config file raises
        raise UserError(f"Trial {name}: {cli.explain(error)}") from error
    return config


def _name(fields: dict[str, Any]) -> str:
    """Returns the folder's name: all that differs, in letters that shells and URLs leave alone."""
    if not fields:
        return "as-configured"
    text = ",".join(f"{field}={value}" for field, value in fields.items())
    name = re.sub(r"[^\w.,=+-]+", "-", text, flags=re.ASCII)
    if name == text and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[:_MAX_NAME]}-{digest}"
