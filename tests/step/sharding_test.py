"""Arrays go where the mesh says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.errors import UserError
from vitcls.step import sharding


def test_mesh_fills_the_data_axis():
    mesh = sharding.make_mesh(-1, 2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (8, 2)])
def test_mesh_that_does_not_fit_is_refused(data, fsdp):
    with pytest.raises(UserError, match="does not make 8 devices"):
        sharding.make_mesh(data, fsdp)


def test_large_arrays_are_split_over_fsdp_and_small_ones_are_not():
    mesh = sharding.make_mesh(2, 4)
    tree = {
        "wide": jax.ShapeDtypeStruct((256, 1024), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1001, 256), jnp.float32),
        "small": jax.ShapeDtypeStruct((256,), jnp.float32),
        "indivisible": jax.ShapeDtypeStruct((999, 1001), jnp.float32),
    }
    specs = jax.tree.map(lambda s: tuple(s.spec), sharding.state_shardings(tree, mesh))
    assert specs == {
        "wide": (None, "fsdp"),
        "odd": (None, "fsdp"),
        "small": (),
        "indivisible": (),
    }


def test_prefetch_keeps_batches_in_order_and_spreads_them():
    mesh = sharding.make_mesh(4, 2)
    batches = [{"image": np.full((16, 3), i)} for i in range(5)]
    got = list(sharding.prefetch(iter(batches), mesh))
    assert [int(batch["image"][0, 0]) for batch in got] == [0, 1, 2, 3, 4]
    assert {shard.data.shape for shard in got[0]["image"].addressable_shards} == {(2, 3)}
