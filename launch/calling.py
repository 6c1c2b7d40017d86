"""Calls the programs of clusters: sbatch, squeue, kubectl, gcloud."""

import shutil
import subprocess

from vitcls.errors import UserError


def call(command: list[str], *, text: str | None = None) -> str:
    """Runs a cluster's program and returns its output; `text` is its input.

    Raises:
      UserError: The program is not installed here, or it fails.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"There is no {command[0]} here: submit from a machine that has it, or see with "
            "--dry_run what would be submitted."
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{command[0]} says: {(done.stderr or done.stdout).strip()}")
    return done.stdout
