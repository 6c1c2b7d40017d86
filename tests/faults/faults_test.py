"""Faults, injected into real runs: afterwards the same bits, or a message and the right code."""

import collections
import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults import runs
from vitcls.data import sources


@pytest.fixture(scope="module")
def undisturbed(digits_dir, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run = runs.Run(workdir, digits_dir)
    assert run.wait() == 0, run.output()
    return workdir


@pytest.fixture
def start(digits_dir):
    """Starts runs, and leaves none behind."""
    started = []

    def start(workdir, *overrides, **kwargs):
        started.append(runs.Run(workdir, digits_dir, *overrides, **kwargs))
        return started[-1]

    yield start
    for run in started:
        if run.is_alive():
            run.signal(signal.SIGKILL)


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of the undisturbed run that has yet to say that it is finished."""
    workdir = tmp_path / "finished"
    shutil.copytree(undisturbed, workdir)
    (workdir / "results.json").unlink()
    return workdir


@pytest.mark.parametrize(
    "num_kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["3 kills", "20 kills"]
)
def test_sigkill_at_random_moments(num_kills, start, undisturbed, tmp_path):
    """Most of them while a checkpoint is being written, the others anywhere before the first."""
    rng, phases, num_finished, workdir = random.Random(num_kills), collections.Counter(), 0, None
    seconds = json.loads((undisturbed / "results.json").read_text())["seconds"]
    while phases.total() < num_kills or workdir is not None:
        workdir = workdir or tmp_path / f"run{num_finished}"
        run = start(workdir)
        if phases.total() < num_kills:
            num_saves = rng.randint(0, 4)
            for _ in range(num_saves):
                run.wait_for(lambda run=run: not run.is_saving())
                run.wait_for(run.is_saving)
            time.sleep(rng.uniform(0, 0.05 if num_saves else seconds / 3))
            was_saving = run.is_saving()
            run.signal(signal.SIGKILL)
            if run.wait() == -signal.SIGKILL:
                phases["in a save" if was_saving else "between saves, or before"] += 1
                continue
        assert run.wait() == 0, run.output()
        runs.assert_same(workdir, undisturbed)
        workdir, num_finished = None, num_finished + 1
    print(f"{num_kills} kills: {dict(phases)}; {num_finished} runs came to their end.")


@pytest.mark.slow
def test_a_second_job_on_the_workdir_is_refused_and_the_first_goes_on(start, undisturbed, tmp_path):
    first = start(tmp_path / "run")
    lock = tmp_path / "run/checkpoints/lock"
    assert first.wait_for(lambda: lock.exists() and lock.read_text().endswith("\n"))
    second = start(tmp_path / "run")
    assert second.wait() == 2
    assert f"is being written to by process {first.pid} on " in second.output()
    assert "Traceback" not in second.output()
    assert first.wait() == 0, first.output()
    runs.assert_same(tmp_path / "run", undisturbed)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, cut])
def test_damage_to_a_file_of_any_kind(damage, start, finished, undisturbed):
    """The last checkpoint is set aside, and the steps since the one before are done again.

    That damage to every single file is found is tested without runs, in checkpoint_test.py.
    """
    last = finished / "checkpoints" / str(runs.TOTAL_STEPS)
    files = sorted(path for path in last.rglob("*") if path.is_file())
    kinds = {(path.parent == last, re.sub("[0-9a-f]{32}", "*", path.name)): path for path in files}
    names = [path.relative_to(last).as_posix() for path in kinds.values()]
    num_found = 0
    for name in names:
        damage(last / name)
        run = start(finished)
        assert run.wait() == 0, f"{name}: {run.output()}"
        runs.assert_same(finished, undisturbed)
        (finished / "results.json").unlink()
        if "is damaged" in run.output():
            num_found += 1
            # A seal that is damaged itself may name a file that does not exist.
            assert f"damaged: {name}" in run.output() or name == "sha256.json"
            (aside,) = (finished / "checkpoints").glob("*.corrupt-1")
            shutil.rmtree(aside)
        else:  # not part of the seal: of no consequence
            assert name in ("_CHECKPOINT_METADATA", "commit_success.txt")
        shutil.rmtree(last)
        shutil.copytree(undisturbed / "checkpoints" / str(runs.TOTAL_STEPS), last)
    print(f"{damage.__name__}: {len(names)} kinds of files, {num_found} found damaged.")
    assert num_found == len(names) - 2


@pytest.mark.slow
def test_damage_to_all_checkpoints_never_starts_anew(start, finished, undisturbed):
    for step in (finished / "checkpoints").iterdir():
        if step.name.isdigit():
            flip_a_bit(next((step / "params").rglob("d/*")))
    for _ in range(2):
        run = start(finished)
        assert run.wait() == 74
        assert "All checkpoints in" in run.output() and "Put a sound copy" in run.output()
    for step in (undisturbed / "checkpoints").iterdir():  # as it says: the last, and the best
        if step.name.isdigit():
            shutil.copytree(step, finished / "checkpoints" / step.name)
    assert start(finished).wait() == 0
    assert runs.results(finished) == runs.results(undisturbed)


@pytest.mark.slow
def test_a_run_that_cannot_save_trains_to_its_end_and_exits_with_74(start, undisturbed, tmp_path):
    run = start(tmp_path / "run", file_size=2**14)  # of parameters, not of metrics
    assert run.wait() == 74
    assert run.output().count("could not be saved") == 21  # every save, and the last once more
    assert "it continues from the beginning" in run.output()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["lock"]
    assert start(tmp_path / "run").wait() == 0
    runs.assert_same(tmp_path / "run", undisturbed)


@pytest.fixture
def small_disk(tmp_path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_survived_and_used_again_when_there_is_room(start, undisturbed, small_disk):
    run = start(small_disk / "run")
    assert run.wait_for(run.is_saving)
    run.signal(signal.SIGSTOP)
    ballast = (small_disk / "ballast").open("wb", buffering=0)
    with ballast, pytest.raises(OSError, match="No space left"):
        while ballast.write(bytes(2**12)):
            pass
    run.signal(signal.SIGCONT)
    assert run.wait_for(lambda: "could not be saved" in run.output())
    run.signal(signal.SIGSTOP)
    (small_disk / "ballast").unlink()
    run.signal(signal.SIGCONT)
    assert run.wait() == 0, run.output()
    (small_disk / "ballast").touch()
    runs.assert_same(small_disk / "run", undisturbed)


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_explained_through_a_kill(
    start, tmp_path, digits_dir
):
    """A class of a weight that overflows: its batches, and no other, have an infinite loss."""
    weights = json.dumps({str(digit): 3e38 if digit == 0 else 1 for digit in range(10)})
    flags = (
        f"--config.loss.class_weights={weights}", "--config.augment.mixup=0",
        "--config.train.global_batch_size=4", "--config.train.max_nonfinite=20",
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole, *flags).wait() == 0
    run = start(parts, *flags)
    assert run.wait_for(lambda: (parts / "checkpoints/12").is_dir())
    run.signal(signal.SIGKILL)
    run.wait()
    assert start(parts, *flags).wait() == 0
    runs.assert_same(parts, whole)

    split = sources.open_split("digits", "train", data_dir=digits_dir)
    labels = {split.id(i): label for i, label in enumerate(split.labels().tolist())}
    for workdir in (whole, parts):
        lines = [json.loads(line) for line in (workdir / "nonfinite.jsonl").open()]
        assert 5 < len(lines) < 40
        assert all(0 in [labels[name] for name in line["ids"]] for line in lines)
        assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
        assert runs.metric_lines(workdir)[-3]["train/num_nonfinite"] == len(lines)

    stopped = start(tmp_path / "stopped", *flags, "--config.train.max_nonfinite=1")
    assert stopped.wait() == 87
    first = json.loads((whole / "nonfinite.jsonl").read_text().splitlines()[0])
    assert f"ERROR: Step {first['step']} diverged" in stopped.output()
    assert first["ids"][0] in stopped.output()


@pytest.mark.slow
def test_another_config_is_refused_and_changes_nothing(start, finished, undisturbed):
    def contents():
        return {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    before = contents()
    run = start(finished, "--config.optim.lr=0.5")
    assert run.wait() == 2
    assert "optim.lr: 0.001 there, 0.5 asked for" in run.output()
    assert contents() == before
    config = json.loads(before[finished / "config.json"])
    for content in (json.dumps(config | {"optim": config["optim"] | {"lr": 3.0}}), "{", None):
        (finished / "config.json").unlink()
        if content is not None:
            (finished / "config.json").write_text(content)
        run = start(finished)
        assert run.wait() == 2
        assert ("optim.lr: 3.0 there" if content and len(content) > 1 else "put it back") in (
            run.output()
        )
    (finished / "config.json").write_bytes(before[finished / "config.json"])
    assert start(finished).wait() == 0
    runs.assert_same(finished, undisturbed)
