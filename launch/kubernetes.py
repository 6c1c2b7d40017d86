"""Kubernetes: one JobSet per run, a pod per machine.

The manifest decides what follows an exit code. 75 (stopped after saving) and evicted pods are
replaced and do not count. 2 and 87 fail the JobSet at once. Any other code, such as 69 (no
devices), restarts all pods, at most `--max_restarts` times.
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
# GKE's TPU nodes: the label of the accelerator, and the chips per machine in a slice of several
# machines (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
_TPUS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
_MAX_CHIPS_OF_ONE_MACHINE = {"v5e": 8, "v6e": 8}  # if the slice fits into it


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
      command: The run's command, for the container's shell.
      workdir: The run's folder, below a volume's path.
      resources: See `launch.resources`.
      image: The container image; its working folder is the repository.
      volumes: `CLAIM:/PATH`, persistent volume claims and their mount points.
      tpu: "v5e:4x4", or "" without TPUs.
      namespace: Kubernetes namespace of the JobSet.

    Raises:
      UserError: A volume or the TPU is malformed, or no volume holds the workdir.
    """
    name = job_name(workdir)
    selector, limits, num_machines = {}, {}, resources.nodes
    if tpu:
        selector, chips, num_machines = _tpu_slice(tpu)
        limits["google.com/tpu"] = chips
    env = {"PYTHONUNBUFFERED": "1"}
    if resources.gpus_per_node:
        limits["nvidia.com/gpu"] = resources.gpus_per_node
        # Without a driver jax would silently compute on the CPU.
        env["JAX_PLATFORMS"] = "cuda,cpu"
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
        # Kubernetes takes missing requests from the limits.
        "resources": {"limits": limits},
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
    # The pod policy fails a Job for 2 and 87 only. That reason ends the set; others restart it.
    ends = {
        "name": "mistakeOrDiverged",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    metadata = {"name": name, "namespace": namespace}
    if tpu:
        # Several slices may have this shape: all pods must get machines of the same one.
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
    """Returns the container's shell script; with several machines it sets the process number.

    On a TPU GKE sets it instead, in variables that jax reads.
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
    if num_chips <= _MAX_CHIPS_OF_ONE_MACHINE.get(kind, chips):
        chips = num_chips
    if num_chips % chips:
        raise UserError(f"--tpu={tpu} has {num_chips} chips, and a machine of {kind} has {chips}.")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    return selector, chips, num_chips // chips


def _volumes(volumes: list[str], workdir: str) -> tuple[list[dict], list[dict]]:
    # Workers of the data loader use shared memory; a container has only 64 MB of it by default.
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
            f"--workdir={workdir} is in no volume and would be lost with the pod: name a volume "
            "that holds it with --volume=CLAIM:/PATH, and a workdir below /PATH."
        )
    return claims, mounts


def submit(text: str) -> str:
    """Creates the JobSet; returns the output of kubectl."""
    return call(["kubectl", "create", "--filename=-"], text=text).strip()
