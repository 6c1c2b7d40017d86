r"""Runs many trials of a recipe: grids, random draws, seeds.

  python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/lr_wd.py \
    --workdir=runs/sweep

The sweep file's `get_sweep()` returns the trials, built with the helpers of launch/space.py. Each
trial is one `python -m vitcls.main` in a folder of its own under --workdir, named after what makes
it different. One that fails does not stop the others. Any field of the config can be set for all
of them, for example

  --config.data.source=folder:PATH --config.train.total_epochs=5

Ctrl-C lets the running trials save. Run the same command again to go on: finished trials never run
again, stopped ones continue, failed ones are tried again; trials may be added to the sweep file. At
the end stands a table, grouped by everything but the seed; it is also in sweep.json and sweep.csv.
"""

import logging
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import trials as trials_lib
from vitcls import cli
from vitcls.errors import Interrupted, UserError
from vitcls.signals import StopRequest

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File with the recipe, optionally with arguments: FILE.py or FILE.py:name=value,...",
    lock_config=False,
    accept_new_attributes=True,
)
_SWEEP = flags.DEFINE_string("sweep", None, "Python file whose get_sweep() returns the trials.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the trials' folders and the table.")
_ON = flags.DEFINE_enum("on", "local", ["local"], "Where the trials run.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Trials that run at the same time.", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check every trial, print the commands of those to run, and end."
)

log = logging.getLogger("vitcls")


class TrialsFailed(RuntimeError):
    """Some trials did not finish; each left a log."""

    exit_code = 1


def main() -> None:
    """Checks the flags and every trial's config, then runs what is not finished."""
    cli.config_value(_CONFIG)
    workdir = Path(cli.required(_WORKDIR))
    sweep = trials_lib.load_sweep(cli.required(_SWEEP))
    config_file = flags.FLAGS["config"].config_filename
    trials = trials_lib.make_trials(sweep, config_file, _overrides(), workdir)
    from vitcls import optim  # imports jax: only once the flags are known to be right

    for trial in trials:
        optim.check_args(trial.config.optim.name, dict(trial.config.optim.args))
    unfinished = [trial for trial in trials if trial.results() is None]
    if _DRY_RUN.value:
        for trial in unfinished:
            print(shlex.join(trial.command))
        return
    _run(trials, unfinished, workdir)


def _overrides() -> list[str]:
    """Returns the `--config.FIELD=VALUE` flags of the command line, as they were written."""
    found = []
    for argument in sys.argv[1:]:
        if not argument.lstrip("-").startswith(("config.", "noconfig.")):
            continue
        if not argument.lstrip("-").startswith("config.") or "=" not in argument:
            raise UserError(f"{argument}: write --config.FIELD=VALUE, which every trial is given.")
        found.append(argument)
    return found


def _run(trials: list, unfinished: list, workdir: Path) -> None:
    from launch import tables
    from launch.pool import Pool
    from vitcls import records

    records.make(workdir)
    log.info("%d trials, %d finished before.", len(trials), len(trials) - len(unfinished))
    pool = Pool(
        unfinished, jobs=_JOBS.value, on_end=lambda: tables.write(workdir, trials, pool.ends)
    )
    with StopRequest() as stop:
        pool.run(stop)
    tables.write(workdir, trials, pool.ends)
    if by_group := tables.groups(trials):
        print(f"Mean (lowest to highest) over the seeds:\n{tables.text(by_group)}")
    if stop.name:
        raise Interrupted(f"{stop.name}: run the same command again to go on.")
    failed = [name for name, end in pool.ends.items() if end["state"] == "failed"]
    if failed:
        raise TrialsFailed(
            f"{len(failed)} of {len(trials)} trials failed; their logs say why, and the same "
            "command tries them again:\n"
            + "\n".join(f"  {workdir / name}/log.txt" for name in failed)
        )
    print(f"{len(trials)} trials -> {workdir}/sweep.json, sweep.csv")


if __name__ == "__main__":
    cli.run(main)
