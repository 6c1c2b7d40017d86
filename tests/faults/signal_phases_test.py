"""Every signal in every phase: exit 75 in time, nothing lost, nothing left behind."""

import signal

import pytest

from tests.command_runs import Run, assert_same_run, finished

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
# What clusters give by default is 30 s and more.
GRACE_SECS = 30
# Phase -> flags that make it happen in every start.
PHASES = {
    "setup": [],
    "cache": ["--config.data.cache={folder}"],
    "compile": [],
    "train": [],
    "eval": [],
    "save": ["--config.checkpoint.every_steps=1"],
    "final": [],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits_dir):
    """A run that nothing befalls."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finished(workdir, f"--config.data.data_dir={digits_dir}")
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_signals_in_every_phase(phase, whole, tmp_path, digits_dir, monkeypatch, capsys):
    """One after the other, each in a start of its own, the next of which goes on."""
    if phase == "compile":
        monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    flags = [flag.format(folder=tmp_path) for flag in PHASES[phase]]
    flags.append(f"--config.data.data_dir={digits_dir}")
    for name in SIGNALS:
        run = Run(tmp_path / "run", *flags, fault=f"{phase}:{name}:0")
        codes, outputs = run.end()
        assert codes == [75], outputs[0]
        assert f"{name}: " in outputs[0] and "run the same command again" in outputs[0]
        assert run.seconds_after_fault < GRACE_SECS
        with capsys.disabled():
            print(f" {phase} {name} {run.seconds_after_fault:.1f} s", end="", flush=True)
    finished(tmp_path / "run", *flags)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(tmp_path, digits_dir):
    """And not after the step and its save."""
    run = Run(
        tmp_path / "run", f"--config.data.data_dir={digits_dir}", fault="train:SIGINT_TWICE:0"
    )
    codes, _ = run.end()
    assert codes == [128 + signal.SIGINT]
    assert run.seconds_after_fault < 5
