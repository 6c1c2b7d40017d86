"""Processes find each other, agree, vote and end together; their runs are those of one process."""

import json
import socket
import subprocess
import sys

import jax
import pytest

from tests.command_runs import (
    ROOT,
    Run,
    assert_same_samples_and_losses,
    finished,
    free_address,
)
from vitcls.errors import UserError
from vitcls.processes import distributed
from vitcls.step import sharding

# What two processes do: agree, see one folder, vote, and end; by the second argument one of them
# does not agree, or does not see the folder.
PROGRAM = """
import pathlib, sys, time
import jax
from vitcls import cli
from vitcls.processes import distributed
from vitcls.step import sharding

address, odd, folder, process = sys.argv[1:]
process = int(process)

distributed._GRACE_SECS = 1

def main():
    distributed.initialize(address, 2, process)
    is_odd = process == 1
    distributed.check_same({"a": [1, 2], "b": 5 if odd == "facts" and is_odd else 4})
    own = pathlib.Path(folder) / ("other" if odd == "folder" and is_odd else "own")
    own.mkdir(exist_ok=True)
    distributed.check_shared(own, patience_secs=1)
    assert not list(own.glob(".*")) or process == 1  # the probe is gone
    vote = distributed.late_maximum(sharding.make_mesh(-1, 1))
    votes = [vote(7 if is_odd and step == 2 else 0) for step in range(5)]
    assert votes == [0, 0, 0, 7, 0], votes
    distributed.wait_for_all("here")
    if is_odd:
        print("bye", flush=True)
        distributed.leave(75, "SIGTERM: saved")
    distributed.wait_for_all("never")

sys.argv = sys.argv[:1]
cli.run(main)
"""


def run_two(tmp_path, odd: str = "") -> tuple[list[int], list[str]]:
    address = free_address()
    command = [sys.executable, "-c", PROGRAM, address, odd, str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*command, str(i)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def test_two_processes_agree_vote_and_end_with_the_code_of_the_first(tmp_path):
    codes, outputs = run_two(tmp_path)
    assert codes == [75, 75], outputs
    assert "bye" in outputs[1]
    assert "Process 0 ends because process 1 did, with code 75: SIGTERM: saved" in outputs[0]


def test_processes_that_differ_say_where_and_all_end(tmp_path):
    codes, outputs = run_two(tmp_path, "facts")
    assert codes == [2, 2], outputs
    assert "ERROR: Process 1 on" in outputs[1]
    assert "  b: 5 here, 4 there\nStart all processes with the same command" in outputs[1]
    assert "  a:" not in outputs[1]
    assert "with code 2: Process 1 on" in outputs[0] and "  b: 5 here, 4 there" in outputs[0]


def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
    codes, outputs = run_two(tmp_path, "folder")
    assert codes == [2, 2], outputs
    assert "is not the folder that process 0 on" in outputs[1]
    assert "put it on a file system that all machines share" in outputs[1]


def test_one_process_passes_through_all_of_it(tmp_path):
    distributed.initialize(num_processes=1)
    distributed.check_same({"a": object()})
    distributed.check_shared(tmp_path)
    distributed.wait_for_all("here")
    vote = distributed.late_maximum(sharding.make_mesh(-1, 1))
    assert [vote(3), vote(0)] == [3, 0]
    distributed.leave(75, "returns")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 2, 0), "--coordinator_address=None, --num_processes=2 and --process_id=0 go toge"),
        (("host:1", None, 0), "set all three, or none"),
        (("host:1", 1, 1), "--process_id=1 must be from 0 to 0, one less than --num_processes=1"),
        (("host", 2, 0), "--coordinator_address=host must be HOST:PORT"),
        (("host:http", 2, 0), "must be HOST:PORT, of process 0"),
        (("host:1", 2, 2), "--process_id=2 must be from 0 to 1"),
        (("host:1", 2, -1), "--process_id=-1 must be from 0 to 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.initialize(*flags)


def test_a_taken_port_has_a_message_and_is_tried_again():
    program = (
        "import sys; from vitcls import cli; from vitcls.processes import distributed\n"
        "address, sys.argv = sys.argv[1], sys.argv[:1]\n"
        "cli.run(lambda: distributed.initialize(address, 2, 0))\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-c", program, address], cwd=ROOT, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert result.returncode == 69, result.stderr
    message = f"ERROR: The processes of the run cannot meet at {address} (--coordinator_address)"
    assert message in result.stderr and "another program has the port" in result.stderr
    assert "Traceback" not in result.stderr


def test_rows_of_a_process_are_neighbours_whatever_the_order_of_devices():
    devices = jax.devices()
    mesh = sharding.make_mesh(2, 4, devices=devices[::-1])
    assert mesh.devices.flatten().tolist() == devices


@pytest.fixture(scope="module")
def data_flag(digits_dir):
    return f"--config.data.data_dir={digits_dir}"


@pytest.fixture(scope="module")
def one(tmp_path_factory, data_flag):
    """A run of one process with one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finished(workdir, data_flag)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_are_one_run(num_processes, one, tmp_path, data_flag):
    finished(tmp_path / "run", data_flag, num_processes=num_processes)
    assert_same_samples_and_losses(one, tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["devices"]["processes"] == num_processes
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.slow
def test_two_processes_with_large_arrays_split_are_one_run(tmp_path, data_flag):
    """Over two devices each: kernels over pairs of them, LoRA, images from workers."""
    flags = [
        data_flag, "--config.mesh.fsdp=2", "--config.data.num_workers=1",
        "--config.model.arch=vit_nano4", "--config.adapt.lora_rank=2",
    ]  # fmt: skip
    finished(tmp_path / "one", *flags, num_devices=4)
    finished(tmp_path / "two", *flags, num_devices=2, num_processes=2)
    assert_same_samples_and_losses(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "starts",
    [
        [dict(num_processes=2), dict(num_processes=1), dict(num_processes=3)],
        [dict(num_devices=4), dict(num_devices=1), dict(num_devices=8)],
    ],
    ids=["processes 2 -> 1 -> 3", "devices 4 -> 1 -> 8"],
)
def test_a_run_goes_on_with_other_processes_and_devices(starts, one, tmp_path, data_flag):
    first, second, third = starts
    for number, start in enumerate([first, second]):
        fault = "train:SIGTERM:0" if number == 0 else "eval:SIGUSR2:0"
        codes, outputs = Run(tmp_path / "run", data_flag, fault=fault, **start).end()
        assert set(codes) == {75}, outputs
    finished(tmp_path / "run", data_flag, **third)
    assert_same_samples_and_losses(one, tmp_path / "run")


@pytest.mark.slow
def test_processes_of_different_configs_end_with_code_2(tmp_path, data_flag):
    run = Run(
        tmp_path / "run",
        data_flag,
        num_processes=2,
        flags_of={1: ["--config.train.seed=1", "--config.optim.lr=0.002"]},
    )
    codes, outputs = run.end()
    assert codes == [2, 2], outputs
    for line in ("config.train.seed: 1 here, 0 there", "config.optim.lr: 0.002 here, 0.001 there"):
        assert line in outputs[1]
    assert not (tmp_path / "run").exists()
