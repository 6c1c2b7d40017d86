"""SLURM: one batch script per run, one array job per sweep.

Each GPU gets a process; jax finds the others by SLURM's variables. SLURM sends SIGTERM to the
processes before the time limit, at preemption and at `scontrol requeue`. A run then saves and ends
with 75, and the script puts its own job back into the queue, under the same id.

If GPUs are requested, jax must find them: without a driver it would compute on the CPU.
"""

import shlex
from pathlib import Path

from launch.calling import call
from launch.resources import Resources, job_name

# Follows a run that ended by itself, or that SLURM told to save before the time limit. If SLURM or
# a broken machine ended the job, SLURM itself requeues it. A cancelled job stays cancelled.
_AFTER = """\
code=$?
failures={failures}-$SLURM_JOB_ID.txt
case $code in
  0 | 2 | 87) exit $code ;;  # finished, a mistake, diverged: another start would end alike
  75) ;;  # stopped after saving
  *)
    echo "$code" >> "$failures"
    if [ "$(wc -l < "$failures")" -gt {max_restarts} ]; then exit $code; fi
    ;;
esac
if [ -n "$told" ]; then exit $code; fi
# If its one node has no devices, the job goes to another node, if the partition has one.
if [ "$code" = 69 ] && [ "$SLURM_JOB_NUM_NODES" = 1 ]; then
  before=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'ExcNodeList=[^( ]*' | cut -d= -f2)
  excluded=${{before:+$before,}}$SLURM_JOB_NODELIST
  num_excluded=$(scontrol show hostnames "$excluded" | sort -u | wc -l)
  all_nodes=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N)
  if [ "$num_excluded" -ge "$(sort -u <<< "$all_nodes" | wc -l)" ]; then excluded=; fi
fi
echo "Ended with $code: back into the queue."
trap '' TERM  # SLURM now sends it to this shell and its children
scontrol requeue "$SLURM_JOB_ID"
if [ -n "$excluded" ]; then scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded"; fi
exit $code
"""


def script(command: list[str], workdir: Path, resources: Resources) -> str:
    """Returns the batch script of one run; its log is `slurm-JOB.log` in the workdir."""
    head = _head(workdir, resources, output=str(workdir).replace("%", "%%") + "/slurm-%j.log")
    after = _after(shlex.quote(str(workdir / "failures")), resources)
    return "\n".join([*head, _srun(resources) + shlex.join(command), after])


def array_script(
    commands: Path, num_trials: int, workdir: Path, resources: Resources, *, jobs: int
) -> str:
    """Returns the batch script of a sweep: task i runs line i of `commands`, `jobs` at a time.

    A line has the trial's folder, a tab, and its command in shell syntax.
    """
    head = _head(workdir, resources, output=str(workdir).replace("%", "%%") + "/array-%A.log")
    head.insert(1, f"#SBATCH --array=0-{num_trials - 1}%{jobs}")
    read = [
        f'line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(commands))})',
        "folder=${line%%$'\\t'*}",
        "command=${line#*$'\\t'}",
        'exec >> "$folder/log.txt" 2>&1',
        'echo "$ $command"',
    ]
    after = _after('"$folder"/failures', resources)
    return "\n".join([*head, *read, "eval " + shlex.quote(_srun(resources)) + '"$command"', after])


def _head(workdir: Path, resources: Resources, *, output: str) -> list[str]:
    options = [
        f"--job-name={job_name(workdir)}",
        f"--output={shlex.quote(output)}",
        "--open-mode=append",
        f"--nodes={resources.nodes}",
        f"--ntasks-per-node={resources.gpus_per_node or 1}",
        resources.gpus_per_node and f"--gpus-per-node={resources.gpus_per_node}",
        resources.cpus and f"--cpus-per-task={resources.cpus}",
        resources.memory and f"--mem={resources.memory}",
        resources.time and f"--time={resources.time}",
        "--requeue",
        f"--signal=TERM@{resources.grace_secs}",
        *resources.sbatch,
    ]
    return [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options if option),
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        "export PYTHONUNBUFFERED=1",
        *(["export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}"] if resources.gpus_per_node else []),
        *filter(None, [resources.setup]),
        # This shell also gets SIGTERM from scancel, scontrol requeue and preemption. The run saves,
        # and SLURM decides whether the job runs again.
        "trap told=1 TERM",
    ]


def _srun(resources: Resources) -> str:
    # A task that ends first must not kill tasks that are still saving. Every process sees all GPUs
    # of its machine, and jax takes the one with its local number.
    options = ["--kill-on-bad-exit=0", "--gpu-bind=none"]
    if resources.cpus:  # since SLURM 22.05 srun no longer takes it from the job
        options.append(f"--cpus-per-task={resources.cpus}")
    return " ".join(["srun", *options, ""])


def _after(failures: str, resources: Resources) -> str:
    return _AFTER.format(failures=failures, max_restarts=resources.max_restarts)


def submit(text: str, path: Path) -> str:
    """Writes the script, submits it with sbatch and returns the job's id.

    Raises:
      UserError: There is no sbatch here, or it refuses the script.
    """
    path.write_text(text)
    job = call(["sbatch", "--parsable", str(path)])
    return job.strip().partition(";")[0]


def active_tasks() -> dict[tuple[str, int], str]:
    """Returns the state, such as RUNNING, of the user's queued array tasks, by (job, index)."""
    listed = call(["squeue", "--me", "--noheader", "--array", "--format=%F %K %T"])
    rows = [line.split() for line in listed.splitlines()]
    return {(job, int(index)): state for job, index, state in rows if index.isdecimal()}
