r"""Runs many trials of a recipe: grids, random samples, seeds.

  python -m launch.sweep --config=configs/quickstart.py --sweep=configs/sweeps/lr_wd.py \
    --workdir=runs/sweep

The sweep file's `get_sweep()` returns the trials, built with the helpers of launch/space.py. Each
trial is one `python -m vitcls.main` in its own folder below --workdir, named after its fields. A
trial that fails does not stop the others. Any config field can be set for all trials, for example

  --config.data.source=folder:PATH --config.train.total_epochs=5

Ctrl-C lets the running trials save. The same command resumes the sweep: finished trials do not run
again, stopped ones continue, failed ones are tried again, and new trials of the sweep file are
added. A second start is refused while the first one runs. The command ends with a table, grouped by
everything but the seed, which is also in sweep.json and sweep.csv.

--on=slurm runs the trials as one array job, in which each task gets --nodes, --gpus_per_node and so
on. The command then only watches: after Ctrl-C the job continues.
"""

import logging
import shlex
from pathlib import Path

from absl import flags

from launch import commands, resources, slurm
from launch.stopping import StopRequest
from launch.trials import load_sweep, make_trials
from vitcls import cli
from vitcls.errors import Interrupted
from vitcls.files import make_folder
from vitcls.folders import ownership

_CONFIG = cli.define_config()
_SWEEP = flags.DEFINE(cli.PATH, "sweep", None, "Python file whose get_sweep() returns the trials.")
_WORKDIR = flags.DEFINE(cli.PATH, "workdir", None, "Folder for the trials' folders and the table.")
_ON = flags.DEFINE_enum("on", "local", ["local", "slurm"], "Where the trials run.")
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Trials that run at the same time and share this machine's GPUs evenly; default: "
    "one here, all on SLURM.", lower_bound=1,
)  # fmt: skip
_METRICS = flags.DEFINE_list(
    "metrics", [], "SPLIT/METRIC,... to compare besides the selection metric, such as "
    "test/balanced_accuracy; empty: the accuracy on each of data.eval_splits.",
)  # fmt: skip
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Only check every trial and print the commands that would run."
)
flags.adopt_module_key_flags(resources)

log = logging.getLogger("vitcls")


class TrialsFailed(RuntimeError):
    """Some trials did not finish; each has a log."""

    exit_code = 1


def main() -> None:
    """Checks the flags and every trial's config, then runs the unfinished trials."""
    cli.config_value(_CONFIG)
    workdir = Path(cli.required(_WORKDIR))
    ownership.check(
        "--workdir", workdir,
        ["sweep.json", "sweep.csv", "slurm.json", "array-0.txt", "array-0.sh"],
        is_own=lambda: ownership.has_keys(workdir / "sweep.json", "trials", "groups")
        or any(workdir.glob("*/asked.json")),
    )  # fmt: skip
    sweep = load_sweep(cli.required(_SWEEP))
    resources.check_places(_ON.value, {"max_restarts": ("slurm",)})
    asked = resources.from_flags()
    trials = make_trials(
        sweep,
        flags.FLAGS["config"].config_filename,
        commands.overrides(),
        workdir,
        here=_ON.value == "local",
    )
    unfinished = [trial for trial in trials if trial.results() is None]
    if _DRY_RUN.value:
        if _ON.value == "slurm":
            listed = workdir.absolute() / "array-0.txt"
            num_trials, jobs = len(unfinished), _JOBS.value
            print(slurm.array_script(listed, num_trials, workdir, asked, jobs=jobs or num_trials))
        for trial in unfinished:
            print(shlex.join(trial.command))
        return
    _run(trials, unfinished, workdir, asked)


def _run(trials: list, unfinished: list, workdir: Path, asked: resources.Resources) -> None:
    # Imported late: these import jax, which takes seconds.
    from launch import array, pool, tables
    from vitcls.folders import lock

    def write() -> None:
        tables.write_tables(workdir, trials, runner.states, _METRICS.value)

    tables.check_metrics(_METRICS.value, trials)
    make_folder(workdir)
    # A second start would run the same trials and write the same tables.
    lock.take(workdir / "lock", verb="run")
    log.info("%d trials, %d finished before.", len(trials), len(trials) - len(unfinished))
    with StopRequest() as stop:
        if _ON.value == "local":
            runner = pool.Pool(unfinished, jobs=_JOBS.value or 1, on_change=write)
        else:
            runner = array.Array(unfinished, workdir, on_change=write)
            runner.submit(asked, jobs=_JOBS.value)
        runner.run(stop)
    write()
    if by_group := tables.group_trials(trials, _METRICS.value):
        print(f"Mean (lowest to highest) over the seeds:\n{tables.format_table(by_group)}")
    if stop.name and _ON.value == "slurm":
        raise Interrupted(
            f"{stop.name}: the jobs continue; run the same command again to watch them."
        )
    if stop.name:
        raise Interrupted(f"{stop.name}: run the same command again to resume.")
    failed = [name for name, state in runner.states.items() if state["state"] == "failed"]
    if failed:
        raise TrialsFailed(
            f"{len(failed)} of {len(trials)} trials failed. Their logs say why"
            + (f", or {workdir}/array-JOB.log" if _ON.value == "slurm" else "")
            + "; the same command tries them again:\n"
            + "\n".join(f"  {workdir / name}/log.txt" for name in failed)
        )
    print(f"{len(trials)} trials -> {workdir}/sweep.json, sweep.csv")


if __name__ == "__main__":
    cli.run(main)
