"""The trials of a sweep: command, folder and progress of each."""

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
from vitcls.folders.workdir import Workdir, is_finished
from vitcls.provenance.saved_config import check_same_run

_MAX_NAME = 120  # characters; file systems allow 255 bytes, and more may follow
SEED = "train.seed"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      fields: The config fields that the sweep sets, with their values.
      workdir: Its folder.
      config: All fields, as its command will read them.
      flags: Flags of `python -m vitcls.main`, without the workdir.
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
        """Makes the folder and records the config, so that another sweep cannot take it over."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(self.workdir / "asked.json", self.config.to_dict())

    def total_steps(self) -> int | None:
        """Returns its training steps; None until a run given in epochs has counted them."""
        path, asked = Workdir(self.workdir).config, _read_if_sound(self.workdir / "asked.json")
        if self.config.train.total_steps or not path.exists():
            return self.config.train.total_steps or None
        # The saved number may have been counted for another number of epochs.
        if asked and asked["train"]["total_epochs"] != self.config.train.total_epochs:
            return None
        saved = _read_if_sound(path) or {}
        return saved.get("train", {}).get("total_steps")

    def results(self) -> dict[str, Any] | None:
        """Returns its `results.json` if it is from the last step, else None."""
        results = _read_if_sound(Workdir(self.workdir).results)
        return results if results and is_finished(results, self.total_steps()) else None

    def metrics(self) -> dict[str, float]:
        """Returns the latest training metrics, {} before the first."""
        try:
            with Workdir(self.workdir).metrics.open("rb") as file:
                file.seek(max(file.seek(0, 2) - 8192, 0))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                metrics = json.loads(line)
            except ValueError:  # cut by the seek above, or being written
                continue
            if "train/loss" in metrics:
                return metrics
        return {}

    def last_words(self) -> str:
        """Returns the line of its log that best explains why it ended."""
        try:
            log = (self.workdir / "log.txt").read_text(errors="replace")
        except OSError:
            return ""
        lines = log[log.rfind("\n$ ") + 1 :].splitlines()[1:]  # output of the last command
        errors = [line for line in lines if line.startswith("ERROR: ")]
        return (errors or [line for line in lines if line.strip()] or [""])[-1]


def _read_if_sound(path: Path) -> dict[str, Any] | None:
    """The object in a trial's JSON file, or None.

    A damaged file counts as missing: the trial then starts and writes it again.
    """
    try:
        return read_json(path, remedy="") if path.exists() else None
    except UserError:
        return None


def load_sweep(path: str) -> list[dict[str, Any]]:
    """Returns the result of the file's `get_sweep()`; raises `UserError` if it is not a sweep."""
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
        raise UserError(f"{what}: get_sweep() returns no trials.")
    return trials


def make_trials(
    sweep: list[dict[str, Any]],
    config_file: str,
    overrides: list[str],
    workdir: Path,
    *,
    here: bool = True,
) -> list[Trial]:
    """Returns the trials of a sweep, after checking all of them.

    Args:
      sweep: Config fields and values of each trial; "config" is the config file's argument.
      config_file: Value of `--config`, `FILE.py` or `FILE.py:ARGUMENT`.
      overrides: `--config.FIELD=VALUE` flags for all trials.
      workdir: The sweep's folder.
      here: Whether they will run on this machine.

    Raises:
      UserError: A trial occurs twice, its config has a mistake, or its folder is another run's.
    """
    trials = {}
    for fields in sweep:
        name = _name(fields)
        if name in trials:
            raise UserError(f"Two trials of the sweep are the same: {name}.")
        for override in overrides:
            field = override.lstrip("-").partition("=")[0].removeprefix("config.")
            if field in fields:
                raise UserError(
                    f"{override}: the sweep varies {field} as well; remove one of them."
                )
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
    """Reads the flags as `vitcls.main` will, so that the checked config is the one that runs."""
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
    except Exception as error:  # a config file may raise anything
        raise UserError(f"Trial {name}: {cli.explain(error)}") from error
    return config


def _name(fields: dict[str, Any]) -> str:
    """Returns the folder's name: all fields, in characters that are safe in shells and URLs."""
    if not fields:
        return "as-configured"
    text = ",".join(f"{field}={value}" for field, value in fields.items())
    name = re.sub(r"[^\w.,=+-]+", "-", text, flags=re.ASCII)
    if name == text and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[:_MAX_NAME]}-{digest}"
