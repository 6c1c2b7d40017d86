"""Checkpoints come back bit for bit or not at all; the newest and the best stay."""

import json
import logging
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitcls.checkpoints import folders, seal
from vitcls.checkpoints.manager import Checkpoints
from vitcls.errors import NonFiniteLoss, StorageError, UserError
from vitcls.folders import lock
from vitcls.step import sharding


def tree(value: float):
    return {"layer": {"kernel": jnp.full((4, 8), value), "bias": jnp.arange(8.0) * value}}


def target(dtype=jnp.float32, mesh=None):
    mesh = mesh or sharding.make_mesh(-1, 1)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding.replicated(mesh)),
        tree(0.0),
    )


def save(checkpoints, step, score=None):
    items = {"params": tree(step / 3), "opt_state": (jnp.asarray(step), tree(step / 7))}
    checkpoints.save(step, items, meta={"seconds": step / 2}, score=score)
    checkpoints.wait()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_restores_what_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 3)
    assert checkpoints.meta(3) == {"seconds": 1.5}
    restored = checkpoints.restore(3, {"params": target()})
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": tree(1.0)})


def test_restores_onto_other_meshes(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 3)
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    restored = checkpoints.restore(3, {"params": target(mesh=mesh)})["params"]
    assert restored["layer"]["kernel"].sharding.mesh.size == 2


def test_newest_and_best_stay_and_survive_reopening(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, score in [(1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, None), (6, float("nan"))]:
        save(checkpoints, step, score)
    reopened = Checkpoints(tmp_path / "c", keep=2)
    assert reopened.steps() == [2, 5, 6]
    assert (reopened.best_step(), reopened.latest_step()) == (2, 6)
    save(reopened, 7, 0.95)
    assert reopened.steps() == [6, 7]


def test_a_score_that_comes_later_counts_like_any_other(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 1, 0.1)
    save(checkpoints, 2)
    assert checkpoints.best_step() == 1
    checkpoints.add_score(2, 0.9)
    assert checkpoints.best_step() == 2
    save(checkpoints, 3, 0.5)
    assert Checkpoints(tmp_path / "c").steps() == [2, 3]  # the best stays
    assert not list(tmp_path.rglob("*.tmp"))


def test_latest_of_equal_scores_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    for step in (1, 2, 3):
        save(checkpoints, step, 1.0)
    save(checkpoints, 4, 0.5)
    assert checkpoints.best_step() == 3
    assert checkpoints.steps() == [3, 4]


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    """Also where a version that did not map it wrote it."""
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step, score in ((1, 0.5), (2, 0.4), (3, 0.3)):
        save(checkpoints, step, score)
    checkpoints.wait()
    path = tmp_path / "c" / "2" / "metrics" / "metrics"
    assert json.loads(path.read_text()) == {"score": 0.4}
    path.write_text('{"score": NaN}')
    seal.write(tmp_path / "c" / "2")
    assert Checkpoints(tmp_path / "c", read_only=True).best_step() == 1


def test_without_scores_there_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step() is None
    save(checkpoints, 1)
    assert checkpoints.best_step() is None


def test_other_dtype_is_refused_not_cast(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 1)
    reopened = Checkpoints(tmp_path / "c")
    with pytest.raises(UserError, match="layer/bias is float32, but bfloat16 is wanted"):
        reopened.restore(1, {"params": target(jnp.bfloat16)})
    with pytest.raises(UserError, match="has no 0: it was saved by another network or optimizer"):
        reopened.restore(1, {"params": [target()["layer"]["bias"]]})


def test_dtypes_of_an_optimizer_state_are_compared_too(tmp_path):
    tx = optax.adamw(1e-3)
    with Checkpoints(tmp_path / "c") as checkpoints:
        state = tx.init(tree(1.0))
        checkpoints.save(1, {"opt_state": state}, meta={}, score=None)
    wanted = jax.eval_shape(tx.init, tree(1.0))
    wanted[0].mu["layer"]["bias"] = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    with pytest.raises(UserError, match="0/mu/layer/bias is float32, but bfloat16"):
        Checkpoints(tmp_path / "c").restore(1, {"opt_state": wanted})


def test_a_save_in_flight_survives_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"params": tree(1.0)}, meta={}, score=None)
        _ = 1 / 0
    assert Checkpoints(tmp_path / "c").steps() == [1]


def test_a_disk_without_room_is_survived_and_its_failure_surfaces(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300))
            checkpoints.save(2, {"params": tree(2.0)}, meta={}, score=None)
            assert "it takes 0.1 MB, and 0.0 MB are free. Training continues" in caplog.text
            message = "step 2 in .* could not be saved: .* run the same .* continues after step 1."
            with pytest.raises(StorageError, match=message) as error:
                checkpoints.wait()
            assert error.value.exit_code == 74
        assert names(tmp_path) == {"1", "lock"}
        save(checkpoints, 3)  # with room again
        assert checkpoints.steps() == [3]


def limit_file_size(size: int) -> tuple[int, int]:
    """Writing beyond `size` bytes of a file fails from now on, in this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    return limits


def test_a_write_that_fails_behind_is_told_beside_the_error_that_ends_the_run(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    large = {"params": {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}}
    limits = limit_file_size(2**16)
    try:
        with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, large, meta={}, score=None)
            _ = 1 / 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "The checkpoint of step 1 in" in caplog.text and "could not be saved" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_write_that_fails_behind_is_survived_and_its_failure_surfaces(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    large = {"params": {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, large, meta={}, score=0.5)
        checkpoints.wait()
        limits = limit_file_size(2**16)
        try:
            checkpoints.save(2, large, meta={}, score=0.7)
            checkpoints.save(3, large, meta={}, score=0.8)  # the next one tells of the first
            assert "step 2 in" in caplog.text and "step 3 in" not in caplog.text
            with pytest.raises(StorageError, match="step 3 in .* could not be saved"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == {"1", "lock"}  # nothing half-written keeps the disk full
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (1, 1)
        checkpoints.save(4, large, meta={}, score=0.6)
    assert Checkpoints(tmp_path, read_only=True).steps() == [4]


def test_an_error_that_ends_a_run_does_not_hide_a_failed_save(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": tree(1.0)}, meta={}, score=None)
        _ = 1 / 0
    assert "The checkpoint of step 1" in caplog.text


@pytest.mark.parametrize("item", ["params", "ema"])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, item):
    items = {"params": tree(1.0), "ema": tree(1.0)} | {item: tree(float("inf"))}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(NonFiniteLoss, match="not finite after step 1: they are not saved"):
            checkpoints.save(1, items, meta={}, score=None)
        assert checkpoints.latest_step() is None


def sealed_files(step: Path) -> list[Path]:
    unsealed = {step / "_CHECKPOINT_METADATA", step / "commit_success.txt"}
    return sorted(path for path in step.rglob("*") if path.is_file() and path not in unsealed)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_damage_to_any_sealed_file_is_found_before_anything_is_read(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, score=0.5)
    files = sealed_files(tmp_path / "1")
    assert len(files) > 15
    for path in files:
        before = path.read_bytes()
        damage(path)
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            with pytest.raises(
                StorageError, match="step 1 in .* could not be read: .*the only one"
            ):
                checkpoints.restore(1, {"params": target()})
            with pytest.raises(StorageError, match="step 1 in .* could not be read"):
                checkpoints.item_names(1)
        path.write_bytes(before)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore(1, {"params": target()})


def test_a_damaged_checkpoint_is_set_aside_for_the_newest_sound_one(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, score=step / 10)
    cut(tmp_path / "2/metrics/metrics")
    flip_a_bit(sealed_files(tmp_path / "3/params")[-1])
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (1, 1)
        assert "step 3 in" in caplog.text and "set aside as 3.corrupt-1" in caplog.text
        assert "The newest sound checkpoint is that of step 1." in caplog.text
        save(checkpoints, 2)
        save(checkpoints, 3)  # at the same step again
        assert checkpoints.steps() == [1, 2, 3]
    assert names(tmp_path) == {"1", "2", "3", "2.corrupt-1", "3.corrupt-1", "lock"}


def test_a_run_with_damaged_checkpoints_only_never_starts_anew(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    (tmp_path / "1/sha256.json").unlink()
    for _ in range(2):
        with pytest.raises(StorageError, match="All checkpoints in .* are damaged.*sound copy"):
            Checkpoints(tmp_path)
        assert folders.has_steps(tmp_path)
    lock.release(tmp_path / "lock")


def test_the_score_that_chooses_is_checked_too(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, score=0.5)
        save(checkpoints, 2, score=0.4)
    flip_a_bit(tmp_path / "1/metrics/metrics")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore(2, {"params": target()})  # one does not hide another
        with pytest.raises(StorageError, match="metrics/metrics is not what was written"):
            checkpoints.best_step()


def test_damage_while_a_run_goes_on_is_found_when_it_reads(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        checkpoints.restore(1, {"params": target()})
        save(checkpoints, 2)
        flip_a_bit(sealed_files(tmp_path / "2/params")[-1])
        with pytest.raises(StorageError, match="is not what was written"):
            checkpoints.restore(2, {"params": target()})


def test_what_a_kill_left_half_written_or_half_deleted_is_cleared_away(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    for name in ("2.orbax-checkpoint-tmp", "deleted/0"):
        shutil.copytree(tmp_path / "1/params", tmp_path / name)
    with Checkpoints(tmp_path) as checkpoints:
        assert names(tmp_path) == {"1", "lock"}
        assert checkpoints.steps() == [1]


def test_read_only_needs_an_existing_directory(tmp_path):
    with pytest.raises(UserError, match="no checkpoint has been saved there"):
        Checkpoints(tmp_path / "none", read_only=True)
