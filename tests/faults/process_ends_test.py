"""What befalls one of two processes ends both, with a message and a code; nothing is lost."""

import pytest

from tests.command_runs import FAULT_STEP, Run, assert_same_run, finished

# Fault -> the exit code of the process that it strikes, those that the other may have, and what
# one of the two says. Code -6: aborted by jax, once process 0 has not been heard of for 30 s.
FAULTS = {
    "train:hang:1": (86, {86}, "Stuck: no end of step in 60 s"),
    "train:hang:0": (86, {86}, "Stuck: no end of step in 60 s"),
    "train:SIGKILL:1": (-9, {1, -6}, ""),
    "train:SIGKILL:0": (-9, {1, -6}, ""),
    "train:raise:1": (1, {1}, "a bug"),
    "train:raise:0": (1, {1}, "a bug"),
}
MOST_SECS = 180  # that the heartbeat, the budget of a step, or the grace of the others may take


@pytest.fixture(scope="module")
def flags(digits_dir):
    return [
        f"--config.data.data_dir={digits_dir}",
        "--config.checkpoint.every_steps=1",
        "--config.stall.step_secs=60",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags):
    """A run of two processes that nothing befalls."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finished(workdir, *flags, num_processes=2)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_befalls_one_process_ends_both(fault, whole, flags, tmp_path, capsys):
    run = Run(tmp_path / "run", *flags, num_processes=2, fault=fault)
    codes, outputs = run.end()
    struck = int(fault[-1])
    own_code, other_codes, message = FAULTS[fault]
    assert codes[struck] == own_code and codes[1 - struck] in other_codes, outputs
    assert message in "".join(outputs)
    if own_code == 86:
        assert "command_runs.py" in outputs[struck]  # where it hangs
    assert run.seconds_after_fault < MOST_SECS
    with capsys.disabled():
        print(f" {fault} {codes} {run.seconds_after_fault:.1f} s", end="", flush=True)
    assert not (tmp_path / "run/results.json").exists()
    finished(tmp_path / "run", *flags, num_processes=2)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("struck", [0, 1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(struck, whole, flags, tmp_path):
    run = Run(tmp_path / "run", *flags, num_processes=2, fault=f"train:SIGUSR1:{struck}")
    codes, outputs = run.end()
    assert codes == [75, 75], outputs
    for output in outputs:
        assert f"SIGUSR1: saved after step {FAULT_STEP + 1} of" in output
    finished(tmp_path / "run", *flags, num_processes=2)
    assert_same_run(whole, tmp_path / "run")
