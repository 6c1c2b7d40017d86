"""TPU VMs: the same script on every machine of a slice, through gcloud.

The script continues after the connection ends, and starts the run again if its exit code asks for
that.
"""

import shlex

from launch.calling import call
from launch.resources import Resources, job_name

# The machines agree on stopping, so that all end with 75 and start again together.
_SCRIPT = """\
set -m  # a signal reaches its target only, not everything started here
echo $$ > {pid}
trap 'stopped=1; kill -TERM "$run"' TERM
failures=0
while true; do
  {command} &
  run=$!
  wait "$run"; code=$?
  while kill -0 "$run" 2> /dev/null; do wait "$run"; code=$?; done
  case $code in
    0 | 2 | 87) break ;;  # finished, a mistake, diverged: another start would end alike
    75) ;;  # stopped after saving
    *) failures=$((failures + 1)); if [ "$failures" -gt {max_restarts} ]; then break; fi ;;
  esac
  if [ -n "$stopped" ]; then break; fi
  echo "Ended with $code: starting again."
  sleep 5
done
echo "Ended with $code."
rm -f {pid}
exit $code
"""


def script(command: list[str], workdir: str, resources: Resources) -> str:
    """Returns the script for each machine, in the repository's folder; SIGTERM ends it for good."""
    name = job_name(workdir)
    loop = _SCRIPT.format(
        pid=f'"$HOME"/{name}.pid',
        command=shlex.join(command),
        max_restarts=resources.max_restarts,
    )
    return "\n".join([*filter(None, [resources.setup]), "export PYTHONUNBUFFERED=1", loop])


def start_command(text: str, workdir: str, *, tpu: str, folder: str, zone: str, project: str):
    """Returns the gcloud command that starts the script on all machines of the TPU VM `tpu`.

    Args:
      text: The result of `script`.
      workdir: Folder of the run.
      tpu: Name of the TPU VM.
      folder: Folder of the repository on its machines.
      zone: Zone of the TPU VM; "": gcloud's default.
      project: Project of the TPU VM; "": gcloud's default.
    """
    name = job_name(workdir)
    log = f'"$HOME"/{name}.log'
    refuse = f'if kill -0 "$(cat "$HOME"/{name}.pid 2> /dev/null)" 2> /dev/null; then'
    remote = (
        f'cd {folder} || exit 1; {refuse} echo "{name} runs here already." >&2; exit 1; fi; '
        f"setsid nohup bash -c {shlex.quote(text)} >> {log} 2>&1 < /dev/null & "
        f'echo "$(hostname): log in {name}.log"'
    )
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", tpu, "--worker=all"]
    command += [f"--zone={zone}"] * bool(zone) + [f"--project={project}"] * bool(project)
    return [*command, f"--command={remote}"]


def submit(command: list[str]) -> str:
    """Starts the script on all machines; returns their output."""
    return call(command).strip()
