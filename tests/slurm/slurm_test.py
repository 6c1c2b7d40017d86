"""Runs and sweeps on a real SLURM of two nodes on this machine, see cluster.sh.

  pytest -m slow -n 0 tests/slurm

Needs root, and the packages slurmctld, slurmd and slurm-client.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vitcls import pretrained

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "cluster.sh"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.getuid() != 0, reason="no SLURM here, or not root"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.delenv("XLA_FLAGS")  # one device per process, as in a job
        subprocess.run([SCRIPT, "start", folder], check=True)
        yield
        subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture
def flags(digits_dir) -> list[str]:
    """A network that trains two thousand steps within half a minute."""
    return [
        "--config=configs/quickstart.py:init=scratch",
        f"--config.data.data_dir={digits_dir}",
        "--config.model.arch=vit_mu4",
        "--config.data.image_size=(8, 8)",
        "--config.train.total_epochs=0",
        "--config.train.total_steps=2000",
        "--config.eval.every_steps=1000",
        "--config.log.every_steps=1",
    ]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(*args: str) -> str:
    """Returns the job's id."""
    told = run(sys.executable, "-m", "launch.submit", "--on=slurm", *args)
    return re.match(r"Job (\d+),", told)[1]


def job(number: str) -> dict[str, str]:
    """Returns what SLURM knows about a job."""
    words = run("scontrol", "show", "job", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for(condition, secs: float = 1200) -> None:
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end, run("squeue")
        time.sleep(0.5)


def has_trained(workdir: Path, num_steps: int) -> bool:
    path = workdir / "metrics.jsonl"
    return path.exists() and path.read_text().count("train/loss") >= num_steps


def start_soon(number: str) -> None:
    """SLURM lets a job that was put back wait for two minutes; this one starts now."""
    wait_for(lambda: job(number)["JobState"] == "PENDING")
    run("scontrol", "update", f"JobId={number}", "StartTime=now")


def finish(number: str) -> dict[str, str]:
    wait_for(lambda: job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    return job(number)


def assert_same_end(workdir: Path, other: Path) -> None:
    """The final parameters, and all logits, bit for bit."""
    trees = [pretrained.load(f"{path}@last")[1] for path in (workdir, other)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    for split in ("test", "holdout"):
        a, b = (np.load(path / f"predictions/{split}.npz") for path in (workdir, other))
        np.testing.assert_array_equal(a["logits"], b["logits"])


@pytest.fixture
def undisturbed(flags, tmp_path) -> Path:
    run(sys.executable, "-m", "vitcls.main", *flags, f"--workdir={tmp_path}/undisturbed")
    return tmp_path / "undisturbed"


@pytest.mark.parametrize("stop", ["requeued by SLURM", "stopped by a signal"])
def test_a_job_stopped_in_the_middle_ends_as_an_undisturbed_run(stop, flags, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    number = submit(*flags, f"--workdir={workdir}")
    wait_for(lambda: has_trained(workdir, 100))
    if stop == "requeued by SLURM":
        run("scontrol", "requeue", number)
    else:  # as before the time limit: to the run only, and the script puts the job back
        run("scancel", "--signal=TERM", number)
    start_soon(number)
    end = finish(number)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    continued = json.loads((workdir / "manifest.json").read_text())["continued"]
    assert len(continued) == 1 and 100 <= continued[0]["step"] < 2000
    assert_same_end(workdir, undisturbed)


@pytest.mark.skipif(
    importlib.util.find_spec("vitcls.processes.distributed") is None, reason="one process only"
)
def test_a_job_of_two_nodes_is_one_run_also_when_it_is_put_back(flags, undisturbed, tmp_path):
    workdirs = [tmp_path / "two", tmp_path / "two-again"]
    for workdir in workdirs:
        number = submit(*flags, f"--workdir={workdir}", "--nodes=2")
        if workdir == workdirs[1]:
            wait_for(lambda workdir=workdir: has_trained(workdir, 100))
            run("scontrol", "requeue", number)
            start_soon(number)
        end = finish(number)
        assert (end["JobState"], end["NumNodes"]) == ("COMPLETED", "2")
        manifest = json.loads((workdir / "manifest.json").read_text())
        assert manifest["devices"]["processes"] == 2
    assert len(manifest["continued"]) == 1
    assert_same_end(*workdirs)
    one, two = (losses(workdir)[:50] for workdir in (undisturbed, workdirs[0]))
    np.testing.assert_allclose(two, one, rtol=1e-5)


def losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_mistake_is_not_put_back(flags, tmp_path):
    number = submit(*flags, "--config.data.source=folder:/nowhere", f"--workdir={tmp_path}/run")
    end = finish(number)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert "ERROR: " in (tmp_path / f"run/slurm-{number}.log").read_text()


def test_a_job_without_devices_goes_to_the_other_node(flags, tmp_path):
    workdir = tmp_path / "run"
    # As on a node whose driver is broken, which jax's CPU would stand in for.
    broken = '[ "$SLURM_JOB_NODELIST" = n2 ] || export JAX_PLATFORMS=cuda,cpu'
    number = submit(
        *flags, f"--workdir={workdir}", f"--setup={broken}", "--sbatch=--nodelist=n1",
        "--config.train.total_steps=20", "--config.eval.every_steps=10",
    )  # fmt: skip
    wait_for(lambda: job(number)["ExcNodeList"] == "n1")
    run("scontrol", "update", f"JobId={number}", "ReqNodeList=")
    start_soon(number)
    end = finish(number)
    assert (end["JobState"], end["NodeList"], end["Restarts"]) == ("COMPLETED", "n2", "1")
    assert "jax cannot start its devices" in (workdir / f"slurm-{number}.log").read_text()


def test_a_sweep_is_one_array_and_goes_on(flags, tmp_path):
    sweep = tmp_path / "six.py"
    sweep.write_text(
        "from launch.space import grid, seeds\n"
        "def get_sweep():\n"
        "    return seeds(grid({'optim.lr': [1e-3, 3e-3]}), 3)\n"
    )
    workdir = tmp_path / "sweep"
    command = [
        *(sys.executable, "-m", "launch.sweep", "--on=slurm", "--jobs=2", f"--sweep={sweep}"),
        *(f"--workdir={workdir}", *flags),
    ]
    watching = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first = workdir / "optim.lr=0.001,train.seed=0"
    wait_for(lambda: has_trained(first, 100))
    (number,) = json.loads((workdir / "slurm.json").read_text())
    run("scontrol", "requeue", f"{number}_0")
    wait_for(lambda: "0 PENDING" in run("squeue", "--array", "--noheader", "--format=%K %T"))
    run("scontrol", "update", f"JobId={number}_0", "StartTime=now")
    table, _ = watching.communicate(timeout=900)
    assert watching.returncode == 0, table
    assert table.splitlines()[1].split()[0] == "optim.lr" and "6 trials" in table
    found = json.loads((workdir / "sweep.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 6
    assert [group["seeds"] for group in found["groups"]] == [[0, 1, 2]] * 2
    assert len(json.loads((first / "manifest.json").read_text())["continued"]) == 1
    run(*command)  # nothing is left to do
    assert list(json.loads((workdir / "slurm.json").read_text())) == [number]
