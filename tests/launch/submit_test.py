"""What clusters are handed: run with programs in the place of theirs, or held to their schemas."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch import kubernetes, slurm, tpu_vm
from launch.resources import Resources, job_name
from tests import forked
from vitcls.errors import UserError

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((Path(__file__).parents[1] / "jobset_schema.json").read_text())
COMMAND = ["python", "-m", "vitcls.main", "--config=c.py", "--config.adapt.train=.*/(a|b)'s $x"]
# Ends with the codes in the file "codes", one after the other; notes what it was called with.
ENDS_WITH = """#!/bin/bash
printf '%s\\n' "$*" >> {folder}/calls
code=$(head -n 1 {folder}/codes)
sed -i 1d {folder}/codes
exit $code
"""
CODES = [
    ([0], 0),
    ([2], 2),
    ([87], 87),
    ([75, 75, 75, 75, 0], 0),
    ([1, 75, 134, 0], 0),
    ([69, 75, 69, 0], 0),
    ([1, 1, 86, 0], 86),
]


def fake(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder at the head of PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def submit(*args: str) -> subprocess.CompletedProcess:
    return forked.run("launch.submit", "--config=configs/quickstart.py", *args)


# SLURM


@pytest.mark.parametrize(("codes", "last"), CODES)
def test_slurm_puts_a_job_back_as_its_code_says(codes, last, programs, tmp_path):
    fake(programs, "srun", ENDS_WITH.format(folder=programs))
    requeue = f'#!/bin/bash\nif [ "$1" = requeue ]; then echo "$*" > {programs}/requeued; fi\n'
    fake(programs, "scontrol", requeue)
    (programs / "codes").write_text("".join(f"{code}\n" for code in codes))
    text = slurm.script(COMMAND, tmp_path, Resources(max_restarts=2))
    starts = 0
    while True:  # as SLURM does: the same script again when it was asked to
        starts += 1
        (programs / "requeued").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-c", text], capture_output=True, text=True,
            env=os.environ | {"SLURM_JOB_ID": "7"}, check=False,
        )  # fmt: skip
        if not (programs / "requeued").exists():
            break
        assert (programs / "requeued").read_text() == "requeue 7\n"
    assert done.returncode == last and starts == (len(codes) - (last == 86))
    call = (programs / "calls").read_text().splitlines()[0]
    assert call.endswith(" ".join(COMMAND))


@pytest.mark.parametrize(
    ("nodes", "before", "num_nodes", "updated"),
    [
        ("n1", "(null)", 3, "update JobId=7 ExcNodeList=n1"),
        ("n2", "n1,n7", 4, "update JobId=7 ExcNodeList=n1,n7,n2"),
        ("n2", "n1", 2, None),  # there is no other
        ("n[1-2]", "(null)", 9, None),  # and nobody knows which of the two it is
    ],
)
def test_slurm_sends_a_job_without_devices_elsewhere(
    nodes, before, num_nodes, updated, programs, tmp_path
):
    fake(programs, "srun", "#!/bin/bash\nexit 69\n")
    fake(
        programs, "scontrol",
        f'#!/bin/bash\necho "$*" >> {programs}/calls\ncase "$*" in\n'
        f"  'show job 7') echo '   ReqNodeList=(null) ExcNodeList={before}' ;;\n"
        "  'show hostnames '*) tr , '\\n' <<< $3 ;;\nesac\n",
    )  # fmt: skip
    fake(programs, "sinfo", f"#!/bin/bash\nseq {num_nodes}\n")
    own = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes, "SLURM_JOB_PARTITION": "all"}
    own["SLURM_JOB_NUM_NODES"] = "2" if "[" in nodes else "1"
    text = slurm.script(COMMAND, tmp_path, Resources())
    done = subprocess.run(["bash", "-c", text], env=os.environ | own, check=False)
    assert done.returncode == 69
    calls = (programs / "calls").read_text().splitlines()
    # Nothing comes between: SLURM ends what the script starts after it has put the job back.
    assert calls[calls.index("requeue 7") + 1 :] == [updated] * bool(updated)


@pytest.mark.parametrize(("gpus", "platforms"), [(0, ""), (2, "cuda,cpu")])
def test_slurm_has_jax_start_the_gpus_that_are_asked_for(gpus, platforms, programs, tmp_path):
    fake(programs, "srun", f'#!/bin/bash\necho "$JAX_PLATFORMS" > {programs}/platforms\n')
    text = slurm.script(COMMAND, tmp_path, Resources(gpus_per_node=gpus))
    own = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    subprocess.run(["bash", "-c", text], env=own | {"SLURM_JOB_ID": "7"}, check=True)
    assert (programs / "platforms").read_text().strip() == platforms


def test_slurm_asks_for_what_is_wanted(tmp_path):
    asked = Resources(
        nodes=2, gpus_per_node=8, cpus=4, memory="64G", time="1-0", grace_secs=90,
        setup="module load x", sbatch=("--partition=gpu",),
    )  # fmt: skip
    text = slurm.script(COMMAND, tmp_path / "a b", asked)
    options = set(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))
    assert options >= {
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=4", "--mem=64G",
        "--time=1-0", "--signal=TERM@90", "--requeue", "--partition=gpu",
        f"--output='{tmp_path}/a b/slurm-%j.log'",
    }  # fmt: skip
    assert text.index("module load x") < text.index("srun")
    assert re.search(r"^srun .*--cpus-per-task=4 python -m", text, re.MULTILINE)


def test_slurm_array_runs_each_line_in_its_folder(programs, tmp_path):
    fake(programs, "srun", '#!/bin/bash\nshift 2\nexec "$@"\n')
    lines = []
    for index in range(3):
        (tmp_path / f"t {index}").mkdir()
        lines.append(f"{tmp_path}/t {index}\t{sys.executable} -c 'print({index} * 7)'\n")
    (tmp_path / "lines.txt").write_text("".join(lines))
    text = slurm.array_script(tmp_path / "lines.txt", 3, tmp_path, Resources(), jobs=2)
    assert "#SBATCH --array=0-2%2" in text
    for index in (2, 0, 1):
        env = os.environ | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": str(index)}
        subprocess.run(["bash", "-c", text], env=env, check=True)
        log = (tmp_path / f"t {index}/log.txt").read_text().splitlines()
        assert log == [f"$ {sys.executable} -c 'print({index} * 7)'", str(index * 7)]


def test_slurm_names_the_tasks_that_are_in_the_queue(programs):
    fake(programs, "squeue", "#!/bin/bash\nprintf '5 0 RUNNING\\n5 3 PENDING\\n6 N/A RUNNING\\n'")
    assert slurm.active_tasks() == {("5", 0): "RUNNING", ("5", 3): "PENDING"}


# Kubernetes


@pytest.mark.parametrize(
    ("asked", "tpu", "machines", "limits"),
    [
        (Resources(), "", 1, {}),
        (Resources(cpus=4, memory="64G"), "", 1, {"cpu": 4, "memory": "64Gi"}),
        (Resources(nodes=2, gpus_per_node=8, setup="ls"), "", 2, {"nvidia.com/gpu": 8}),
        (Resources(), "v5e:4x4", 4, {"google.com/tpu": 4}),
        (Resources(), "v5e:2x4", 1, {"google.com/tpu": 8}),
        (Resources(), "v6e:1x1", 1, {"google.com/tpu": 1}),
        (Resources(), "v5p:2x2x4", 4, {"google.com/tpu": 4}),
    ],
)
def test_manifests_hold_to_the_schemas(asked, tpu, machines, limits):
    text = kubernetes.manifest(
        COMMAND, "/runs/a", asked, image="x:1", volumes=["data:/data", "runs:/runs"], tpu=tpu
    )
    jobset = yaml.safe_load(text)
    jsonschema.validate(jobset, SCHEMA)
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    for version in ("1.31", "1.37"):
        kubernetes_validate.validate(job, version, strict=True)
    assert spec["completions"] == spec["parallelism"] == machines
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == limits
    env = {one["name"]: one["value"] for one in container["env"]}
    assert env.get("JAX_PLATFORMS") == ("cuda,cpu" if asked.gpus_per_node else None)


def test_schemas_refuse_what_is_wrong():
    text = kubernetes.manifest(COMMAND, "/runs/a", Resources(), image="x", volumes=["r:/runs"])
    jobset = yaml.safe_load(text)
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "FailJob"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, SCHEMA)
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["value"] = [2]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


@pytest.mark.parametrize(("nodes", "index"), [(1, "0"), (3, "2")])
def test_pods_run_the_command_and_know_who_they_are(nodes, index, programs):
    fake(programs, "python", f'#!/bin/bash\nprintf "%s\\n" "$@" > {programs}/args\n')
    asked = Resources(nodes=nodes)
    text = kubernetes.manifest(COMMAND, "/runs/a", asked, image="x", volumes=["r:/runs"])
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    env = os.environ | {"JOB_COMPLETION_INDEX": index}
    subprocess.run(pod["containers"][0]["command"], env=env, check=True)
    args = (programs / "args").read_text().splitlines()
    assert args[: len(COMMAND) - 1] == COMMAND[1:]
    name = job_name("/runs/a")
    assert args[len(COMMAND) - 1 :] == (
        ["--num_processes=1"] if nodes == 1
        else [f"--coordinator_address={name}-run-0-0.{name}:8476", "--num_processes=3",
              "--process_id=2"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("volumes", "tpu", "message"),
    [
        (["runs"], "", "--volume=runs must be CLAIM:/PATH"),
        (["data:/data"], "", "--workdir=/runs/a is in no volume"),
        (["r:/runs"], "v5:4x4", "Unknown kind of --tpu 'v5'"),
        (["r:/runs"], "v5e:4xx", "--tpu=v5e:4xx must be KIND:TOPOLOGY"),
        (["r:/runs"], "v5e:3x3", "9 chips"),
    ],
)
def test_kubernetes_mistakes_are_named(volumes, tpu, message):
    with pytest.raises(UserError, match=re.escape(message)):
        kubernetes.manifest(
            COMMAND, "/runs/a", Resources(), image="x", volumes=volumes, tpu=tpu
        )  # fmt: skip


def test_names_are_labels_and_differ_by_folder():
    names = [job_name(path) for path in ("/a/Pets_2", "/b/Pets_2", "/a/" + "x" * 200, "/a/...")]
    assert len(set(names)) == 4
    # A pod's host name, at most 63 letters, is NAME-run-0-0.
    assert all(re.fullmatch(r"vitcls-[a-z0-9-]{1,40}", name) for name in names)


# TPU VM


@pytest.fixture
def tpu(programs, tmp_path, monkeypatch):
    """Starts a run as gcloud would on one machine; returns its log."""
    home = tmp_path / "home"
    (home / "vitcls").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    fake(programs, "sleep", "#!/bin/bash\n")
    fake(
        programs, "gcloud",
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {programs}/gcloud-args\n'
        'cd "$HOME"; for last; do :; done; exec bash -c "${last#--command=}"\n',
    )  # fmt: skip

    def start(max_restarts: int) -> Path:
        text = tpu_vm.script(COMMAND, "/mnt/runs/a", Resources(max_restarts=max_restarts))
        command = tpu_vm.start_command(
            text, "/mnt/runs/a", tpu="my-tpu", folder="vitcls", zone="z", project=""
        )
        tpu_vm.submit(command)
        return home / f"{job_name('/mnt/runs/a')}.log"

    return start


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("codes", "last"), CODES)
def test_a_tpu_vm_starts_again_as_the_code_says(codes, last, programs, tpu):
    fake(programs, "python", ENDS_WITH.format(folder=programs))
    (programs / "codes").write_text("".join(f"{code}\n" for code in codes))
    log = tpu(max_restarts=2)
    wait_for(lambda: log.exists() and f"Ended with {last}.\n" in log.read_text())
    calls = (programs / "calls").read_text().splitlines()
    assert len(calls) == len(codes) - (last == 86)
    assert calls[0] == " ".join(COMMAND[1:])
    args = (programs / "gcloud-args").read_text().splitlines()
    assert args[:7] == ["compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--worker=all", "--zone=z"]


def test_a_tpu_vm_refuses_a_second_start_and_stops_for_good_when_told(programs, tpu):
    fake(
        programs, "python",
        f"#!/bin/bash\ntrap 'exit 75' TERM\ntouch {programs}/trains\n"
        "while true; do /bin/sleep 0.05; done\n",
    )  # fmt: skip
    log = tpu(max_restarts=2)
    wait_for((programs / "trains").exists)
    with pytest.raises(UserError, match="runs here already"):
        tpu(max_restarts=2)
    os.kill(int(log.with_suffix(".pid").read_text()), signal.SIGTERM)
    wait_for(lambda: "Ended with 75.\n" in log.read_text())
    wait_for(lambda: not log.with_suffix(".pid").exists())
    assert "again" not in log.read_text()


# The command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workdir=x"], "--on is missing"),
        (["--on=local"], "--workdir is missing"),
        (["--on=slurn", "--workdir=x"], "slurn"),
        (["--on=local", "--workdir=x", "--nodes=2"], "--nodes is for --on=slurm or kubernetes"),
        (["--on=slurm", "--workdir=x", "--tpu=v5e:4x4"], "--tpu is for --on=kubernetes or tpu-vm"),
        (["--on=slurm", "--workdir=x", "--memory=64"], "--memory=64 must be a number and a unit"),
        (["--on=slurm", "--workdir=x", "--time=soon"], "--time=soon must be like"),
        (["--on=slurm", "--workdir=x", "--sbatch=gpu"], "--sbatch=gpu must be an option"),
        (["--on=slurm", "--workdir=x", "--config.optim.lr=-1"], "optim.lr=-1.0 is out of range"),
        (["--on=slurm", "--workdir=x", "--noconfig.augment.flip"], "write --config.FIELD=VALUE"),
        (["--on=kubernetes", "--workdir=/x"], "--image is missing"),
        (["--on=tpu-vm", "--workdir=/x"], "--tpu is missing"),
    ],
)
def test_mistakes_exit_2_with_one_message(args, message):
    result = submit(*args)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


def test_submitting_without_the_clusters_program_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = submit("--on=slurm", f"--workdir={tmp_path}/run")
    assert result.returncode == 2
    assert "There is no sbatch here" in result.stderr


def test_help_names_all_flags():
    result = submit("--help")
    assert result.returncode == 0
    assert {"--nodes:", "--tpu:", "--dry_run:"} <= set(result.stdout.split())
