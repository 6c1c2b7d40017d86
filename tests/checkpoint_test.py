"""Checkpoints come back bit for bit; the newest and the best stay."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitcls import sharding
from vitcls.checkpoint import Checkpoints
from vitcls.errors import StorageError, UserError


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


def test_truncated_file_is_a_storage_error_that_names_the_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 5)
    for path in (tmp_path / "c/5/params").rglob("*"):
        if path.is_file() and "d/" in str(path.relative_to(tmp_path)):
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(StorageError, match="checkpoint of step 5 .* could not be read"):
        checkpoints.restore(5, {"params": target()})


def test_a_disk_without_room_ends_a_run_with_74_and_leaves_no_half_checkpoint(
    tmp_path, monkeypatch
):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300))
            message = f"step 2 needs 0.0 MB in {tmp_path}, where 0.0 MB are free; make room and run"
            with pytest.raises(StorageError, match=message) as error:
                save(checkpoints, 2)
        assert error.value.exit_code == 74
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        save(checkpoints, 2)  # with room again
        assert checkpoints.latest_step() == 2


def test_read_only_needs_an_existing_directory(tmp_path):
    with pytest.raises(UserError, match="no checkpoint has been saved there"):
        Checkpoints(tmp_path / "none", read_only=True)
