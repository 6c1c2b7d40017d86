"""Fine-tunes a pretrained image classifier, evaluates it and keeps its checkpoints.

  python -m vitcls.main --config=configs/quickstart.py --workdir=runs/quickstart

Run again with the same --workdir: an unfinished run continues exactly where it was saved, a
finished one says so. Any field of the config can be overridden, for example

  --config.optim.lr=1e-4 --config.train.global_batch_size=64

and config files take arguments after a colon, for example

  --config=configs/quickstart.py:init=scratch

`python -m vitcls.config` prints all fields with their defaults, allowed values and meaning.

On several machines start the same command in every process: SLURM, TPU VMs, Kubernetes and MPI are
recognised. Elsewhere set --coordinator_address, --num_processes and --process_id. The workdir must
be on a file system that all processes share.
"""

from absl import flags

from vitcls import cli
from vitcls.config.checks import check_config
from vitcls.processes import signals

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE(
    cli.PATH,
    "workdir",
    None,
    "Folder for checkpoints, metrics and results; made if it does not exist.",
)
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "Trace this many training steps for TensorBoard's profiler into the workdir.",
    lower_bound=0,
)  # fmt: skip
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, which listens there."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the run; 1: only this one, even on a cluster.",
    lower_bound=1,
)  # fmt: skip
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")


def main() -> None:
    """Checks the flags, then trains."""
    config = cli.config_value(_CONFIG)
    check_config(config)
    workdir = cli.required(_WORKDIR)
    signals.exit_on_signal()  # until training's loop, which saves first
    # These import jax: only once the flags are known to be right.
    from vitcls import START_TIME, train
    from vitcls.processes import distributed

    cli.prepare_jax()
    distributed.initialize(_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    train.train_and_evaluate(
        config, workdir, num_profiled_steps=_PROFILE.value, start_time=START_TIME
    )


if __name__ == "__main__":
    cli.run(main)
