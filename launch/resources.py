"""The resources that a run asks a cluster for, and their flags, for submit and sweep."""

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
    "cpus", 0, "CPU cores per process; 0: the cluster's default.", lower_bound=0
)
_MEMORY = flags.DEFINE_string(
    "memory", "", "Memory per machine, such as 64G; empty: the cluster's default."
)
_TIME = flags.DEFINE_string(
    "time", "", "SLURM: time limit, such as 24:00:00 or 1-0; a run that reaches it saves and "
    "resumes in the next job.",
)  # fmt: skip
_GRACE = flags.DEFINE_integer(
    "grace_secs", 120, "Seconds that a run has to save before it is killed.", lower_bound=10
)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 3, "How often a run is started again after a failure that a new start may "
    "fix, such as 69 (no devices). After 75 it always is; after 2 or 87 never.",
    lower_bound=0,
)  # fmt: skip
_SETUP = flags.DEFINE_string(
    "setup", "", "Shell line before each start, such as 'module load cuda' or "
    "'source .venv/bin/activate'.",
)  # fmt: skip
_SBATCH = flags.DEFINE_multi_string(
    "sbatch",
    [],
    "SLURM: another option of sbatch, as in --sbatch=--partition=gpu",
)

# Values of --on that a flag applies to; the others apply to all.
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
    """The resources of a run; the flags explain each field."""

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
    """Raises `UserError` for a given flag that does not apply to `--on=place`.

    Args:
      place: Value of --on.
      more: The values of --on that further flags apply to.
    """
    for name, places in (_PLACES | (more or {})).items():
        if flags.FLAGS[name].present and place not in places:
            raise UserError(f"--{name} is for --on={' or '.join(places)}, not for --on={place}.")


def from_flags() -> Resources:
    """Returns the resources of the flags; raises `UserError` if one is malformed."""
    if _MEMORY.value and not re.fullmatch(_MEMORY_PATTERN, _MEMORY.value):
        raise UserError(f"--memory={_MEMORY.value} must be a number and a unit, such as 64G.")
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
    """Returns a unique name for the workdir's run, in characters that every cluster accepts."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(workdir).name.lower())[:25].strip("-")
    digest = hashlib.sha256(os.path.abspath(workdir).encode()).hexdigest()[:6]
    return f"vitcls-{name}-{digest}"
