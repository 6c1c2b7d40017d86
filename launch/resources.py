"""What a run asks of a cluster, and the flags that say so: for both commands of this package."""

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from absl import flags

from vitcls.errors import UserError

_NODES = flags.DEFINE_integer(
    "nodes", 1, "Machines per run; on a TPU it follows from --tpu.", lower_bound=1
)
_GPUS = flags.DEFINE_integer("gpus_per_node", 0, "GPUs on each machine; 0: none.", lower_bound=0)
_CPUS = flags.DEFINE_integer(
    "cpus", 0, "CPU cores per process; 0: what the cluster gives by default.", lower_bound=0
)
_MEMORY = flags.DEFINE_string(
    "memory", "", "Memory per machine, as 64G; empty: what the cluster gives by default."
)
_TIME = flags.DEFINE_string(
    "time", "", "SLURM: time limit, as 24:00:00 or 1-0; a run that reaches it saves and goes on in "
    "the next one.",
)  # fmt: skip
_GRACE = flags.DEFINE_integer(
    "grace_secs", 120, "Seconds that a run gets to save before it is stopped.", lower_bound=10
)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 3, "How often a run is started again after a failure that a new start may "
    "mend, such as 69, no devices; after a stop with 75 it is always, after 2 or 87 never.",
    lower_bound=0,
)  # fmt: skip
_SETUP = flags.DEFINE_string(
    "setup", "", "Shell line before each start, such as 'module load cuda' or "
    "'source .venv/bin/activate'.",
)  # fmt: skip
_SBATCH = flags.DEFINE_multi_string(
    "sbatch",
    [],
    "SLURM: a further option of sbatch, as in --sbatch=--partition=gpu",
)

# Where a flag means something; the others are for all.
_PLACES = {
    "nodes": ("slurm", "kubernetes"),
    "gpus_per_node": ("slurm", "kubernetes"),
    "cpus": ("slurm", "kubernetes"),
    "memory": ("slurm", "kubernetes"),
    "grace_secs": ("slurm", "kubernetes"),
    "time": ("slurm",),
    "sbatch": ("slurm",),
    "setup": ("slurm", "kubernetes", "tpu-vm"),
}
_MEMORY_PATTERN = r"\d+[KMGT]"
_TIME_PATTERN = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a run asks for; the flags say what each means."""

    nodes: int = 1
    gpus_per_node: int = 0
    cpus: int = 0
    memory: str = ""
    time: str = ""
    grace_secs: int = 120
    max_restarts: int = 3
    setup: str = ""
    sbatch: tuple[str, ...] = ()


def check_places(place: str, more: dict[str, tuple[str, ...]] | None = None) -> None:
    """Raises `UserError` for a flag that is given and means nothing at `--on=place`.

    Args:
      place: Where the run runs.
      more: Where further flags mean something.
    """
    for name, places in (_PLACES | (more or {})).items():
        if flags.FLAGS[name].present and place not in places:
            raise UserError(f"--{name} is for --on={' or '.join(places)}, not for --on={place}.")


def from_flags() -> Resources:
    """Returns what the flags ask for; raises `UserError` when one cannot be read."""
    if _MEMORY.value and not re.fullmatch(_MEMORY_PATTERN, _MEMORY.value):
        raise UserError(f"--memory={_MEMORY.value} must be a number and a unit: 64G.")
    if _TIME.value and not re.fullmatch(_TIME_PATTERN, _TIME.value):
        raise UserError(f"--time={_TIME.value} must be like 24:00:00, 1-12 (days-hours) or 90.")
    for option in _SBATCH.value:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"--sbatch={option} must be an option: --sbatch=--partition=gpu.")
    return Resources(
        nodes=_NODES.value,
        gpus_per_node=_GPUS.value,
        cpus=_CPUS.value,
        memory=_MEMORY.value,
        time=_TIME.value,
        grace_secs=_GRACE.value,
        max_restarts=_MAX_RESTARTS.value,
        setup=_SETUP.value,
        sbatch=tuple(_SBATCH.value),
    )


def job_name(workdir: str | Path) -> str:
    """Returns a name for the workdir's run, its own, in the characters that every cluster takes."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(workdir).name.lower())[:25].strip("-")
    digest = hashlib.sha256(os.path.abspath(workdir).encode()).hexdigest()[:6]
    return f"vitcls-{name}-{digest}"
