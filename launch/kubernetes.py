"""Kubernetes: one JobSet per run, a pod per machine.

What happens after an exit code is the manifest's: 75 (stopped after saving) and evicted pods are
replaced and do not count, 2 and 87 fail the JobSet at once, anything else, such as 69 (no devices),
restarts all pods, at most `--max_restarts` times.
"""

import math
import shlex
from pathlib import Path
from typing import Any

import yaml

from launch.calling import call
from launch.resources import Resources, job_name
from vitcls.errors import UserError, unknown

_CONTAINER = _JOB = "run"
_PORT = 8476
# Of GKE's TPU nodes: the label of the accelerator, and the chips of one machine of a slice that has
# several (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
_TPUS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
_MOST_CHIPS_OF_ONE_MACHINE = {"v5e": 8, "v6e": 8}  # a slice that fits into one machine


def manifest(
    command: list[str],
    workdir: str,
    resources: Resources,
    *,
    image: str,
    volumes: list[str],
    tpu: str = "",
    namespace: str = "default",
) -> str:
    """Returns the JobSet as YAML.

    Args:
      command: Of the run, as the container's shell finds it.
      workdir: Its folder, below a volume's path.
      resources: See `launch.resources`.
      image: The container image; it starts in the repository.
      volumes: `CLAIM:/PATH`, persistent volume claims and where they are mounted.
      tpu: "v5e:4x4", or "" without TPUs.
      namespace: Where to make it.

    Raises:
      UserError: a volume or the TPU cannot be read, or no volume holds the workdir.
    """
    name = job_name(workdir)
    selector, limits, num_machines = {}, {}, resources.nodes
    if tpu:
        selector, chips, num_machines = _tpu_slice(tpu)
        limits["google.com/tpu"] = chips
    env = {"PYTHONUNBUFFERED": "1"}
    if resources.gpus_per_node:
        limits["nvidia.com/gpu"] = resources.gpus_per_node
        env["JAX_PLATFORMS"] = "cuda,cpu"  # else jax computes on the processor without a driver
    if resources.cpus:
        limits["cpu"] = resources.cpus
    if resources.memory:
        limits["memory"] = resources.memory + "i"
    claims, mounts = _volumes(volumes, workdir)
    container = {
        "name": _CONTAINER,
        "image": image,
        "command": ["bash", "-c", _shell(command, name, num_machines, bool(tpu), resources)],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "resources": {"limits": limits},  # and so requested
        "volumeMounts": mounts,
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": resources.grace_secs,
        "containers": [container],
        "volumes": claims,
    }
    if selector:
        pod["nodeSelector"] = selector
    job = {
        "completionMode": "Indexed",
        "completions": num_machines,
        "parallelism": num_machines,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_rules()},
        "template": {"spec": pod},
    }
    # The pod policy fails a Job for 2 and 87 only: that reason ends the set, others restart it.
    ends = {
        "name": "mistakeOrDiverged",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    metadata = {"name": name, "namespace": namespace}
    if tpu:  # all machines of one slice, where several have its shape
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {"maxRestarts": resources.max_restarts, "rules": [ends]},
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }
    return yaml.safe_dump(jobset, sort_keys=False, width=100)


def _pod_rules() -> list[dict[str, Any]]:
    codes = {"containerName": _CONTAINER, "operator": "In"}
    return [
        {"action": "FailJob", "onExitCodes": codes | {"values": [2, 87]}},
        {"action": "Ignore", "onExitCodes": codes | {"values": [75]}},
        {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
    ]


def _shell(
    command: list[str], name: str, num_machines: int, is_tpu: bool, resources: Resources
) -> str:
    """Returns the container's shell script; several machines are told who they are.

    On a TPU GKE tells them, by variables that jax reads.
    """
    line = "exec " + shlex.join(command)
    if num_machines == 1:
        line += " --num_processes=1"
    elif not is_tpu:
        line += (
            f" --coordinator_address={name}-{_JOB}-0-0.{name}:{_PORT}"
            f" --num_processes={num_machines} --process_id=$JOB_COMPLETION_INDEX"
        )
    return "\n".join([*filter(None, [resources.setup]), line])


def _tpu_slice(tpu: str) -> tuple[dict[str, str], int, int]:
    """Returns the node selector, the chips per machine and the machines of "v5e:4x4"."""
    kind, _, topology = tpu.partition(":")
    if kind not in _TPUS:
        raise unknown("kind of --tpu", kind, _TPUS)
    try:
        num_chips = math.prod(int(side) for side in topology.split("x"))
    except ValueError:
        num_chips = 0
    if num_chips < 1:
        raise UserError(f"--tpu={tpu} must be KIND:TOPOLOGY, such as v5e:4x4.")
    label, chips = _TPUS[kind]
    if num_chips <= _MOST_CHIPS_OF_ONE_MACHINE.get(kind, chips):
        chips = num_chips
    if num_chips % chips:
        raise UserError(f"--tpu={tpu} has {num_chips} chips, and a machine of {kind} has {chips}.")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    return selector, chips, num_chips // chips


def _volumes(volumes: list[str], workdir: str) -> tuple[list[dict], list[dict]]:
    # Workers of the data loader share memory; a container has 64 MB of it unless asked for more.
    claims = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    for index, volume in enumerate(volumes):
        claim, colon, path = volume.partition(":")
        if not (claim and colon and path.startswith("/")):
            raise UserError(f"--volume={volume} must be CLAIM:/PATH, such as datasets:/data.")
        claims.append({"name": f"v{index}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"v{index}", "mountPath": path})
    if not any(Path(workdir).is_relative_to(mount["mountPath"]) for mount in mounts[1:]):
        raise UserError(
            f"--workdir={workdir} is in no volume, and so would be lost with the pod: name one "
            "that holds it, --volume=CLAIM:/PATH with a workdir below /PATH."
        )
    return claims, mounts


def submit(text: str) -> str:
    """Makes the JobSet; returns what kubectl says."""
    return call(["kubectl", "create", "--filename=-"], text=text).strip()
