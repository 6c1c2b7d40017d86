"""What is read from compiled programs is what they were written to send."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vitcls.costs.collectives import find_collectives
from vitcls.step import sharding

P = PartitionSpec


def collectives(function, *args, num_passes=1):
    """Of a function on eight devices; args are (shape, spec)."""
    mesh = sharding.make_mesh(2, 4)
    shapes = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in args
    ]
    text = jax.jit(functools.partial(function, mesh)).lower(*shapes).compile().as_text()
    return find_collectives(text, num_devices=8, num_passes=num_passes)


def exchange(communicate, out_spec):
    """A program that does one exchange over the four devices of `fsdp`."""

    def function(mesh, x):
        return jax.shard_map(
            communicate, mesh=mesh, in_specs=P("fsdp"), out_specs=out_spec, check_vma=False
        )(x)

    return function


@pytest.mark.parametrize(
    ("communicate", "out_spec", "kind", "elements"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), P(), "all-reduce", 4 * 32),
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P(), "all-gather", 16 * 32),
        (
            lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
            P("fsdp"),
            "reduce-scatter",
            4 * 32,
        ),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0), P("fsdp"), "all-to-all", 4 * 32),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            P("fsdp"),
            "collective-permute",
            4 * 32,
        ),
    ],
)
def test_each_kind_is_found_with_its_size(communicate, out_spec, kind, elements):
    (found,) = collectives(exchange(communicate, out_spec), ((16, 32), P("fsdp")))
    if kind != "collective-permute":  # has pairs, no groups
        assert found["devices"] == 4
    assert found["kind"] == kind and found["dtype"] == "f32" and found["times"] == 1
    assert found["elements"] == elements and found["bytes"] == 4 * elements


def grad(mesh, w, x):
    return jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w)


def test_a_gradient_of_split_data_is_summed_once():
    (found,) = collectives(grad, ((64, 32), P()), ((16, 64), P(("data", "fsdp"))))
    assert found == {
        "kind": "all-reduce",
        "dtype": "f32",
        "devices": 8,
        "elements": 64 * 32,
        "bytes": 4 * 64 * 32,
        "times": 1,
    }


def test_what_a_loop_sends_counts_as_often_as_it_is_taken():
    def summed(mesh, w, x):
        return jax.lax.scan(lambda c, x: (c + grad(mesh, w, x), None), jnp.zeros_like(w), x)[0]

    (found,) = collectives(summed, ((64, 32), P()), ((6, 16, 64), P(None, ("data", "fsdp"))))
    assert (found["elements"], found["times"]) == (64 * 32, 6)


def test_programs_of_one_device_send_nothing():
    text = jax.jit(jnp.sin).lower(np.ones(4, np.float32)).compile().as_text()
    assert find_collectives(text, num_devices=1, num_passes=1) == []


# As TPU's compiler writes: no trip counts, parts of one exchange in several fusions, groups by
# names, tiled layouts.
TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused_computation.1 (p: bf16[256,128]) -> bf16[1024,128] {
  %all-gather.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
}

%fused_computation.2 (p: bf16[256,128]) -> bf16[1024,128] {
  ROOT %all-gather.2 = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
}

%all-reduce-scatter.3 (p: bf16[1024,128]) -> bf16[256,128] {
  %all-reduce.3 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=8, \
replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, to_apply=%add
  ROOT %slice = bf16[256,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.3, %i, %j)
}

%body (t: (s32[], f32[100])) -> (s32[], f32[100]) {
  %start = (bf16[256,128]{1,0}, bf16[1024,128]{1,0}) fusion(%p), kind=kCustom, \
calls=%fused_computation.1
  %done = bf16[1024,128]{1,0} fusion(%start), kind=kCustom, calls=%fused_computation.2
  %rs = bf16[256,128]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.3
}

%condition (t: (s32[], f32[100])) -> pred[] {
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[100]) -> f32[100] {
  %while.1 = (s32[]{:T(128)}, f32[100]{0:T(128)}) while(%t), condition=%condition, body=%body
  %all-reduce.9 = (f32[100]{0:T(128)}, f32[]{:T(128)}, /*index=2*/f32[384,100]{0,1:T(8,128)S(1)}) \
all-reduce(%x, %y, %z), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add
}
"""


def test_what_tpus_compiler_writes_is_understood():
    assert find_collectives(TPU, num_devices=8, num_passes=5) == [
        {"kind": "all-gather", "dtype": "bf16", "devices": 4, "elements": 1024 * 128,
         "bytes": 2 * 1024 * 128, "times": 5},
        {"kind": "reduce-scatter", "dtype": "bf16", "devices": 4, "elements": 1024 * 128,
         "bytes": 2 * 1024 * 128, "times": 5},
        {"kind": "all-reduce", "dtype": "f32", "devices": 8, "elements": 100 + 1 + 38400,
         "bytes": 4 * (100 + 1 + 38400), "times": 1},
    ]  # fmt: skip


# As GPU's compiler writes: exchanges that begin and end, in two instructions.
GPU = """HloModule jit_step

ENTRY %main (p: f32[100]) -> f32[100] {
  %ar = f32[100]{0} all-reduce-start(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %ard = f32[100]{0} all-reduce-done(%ar)
  %ag = (f32[25]{0}, f32[100]{0}) all-gather-start(%q), channel_id=2, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = f32[100]{0} all-gather-done(%ag)
}
"""


def test_exchanges_that_begin_and_end_count_once():
    found = find_collectives(GPU, num_devices=8, num_passes=1)
    assert [(one["kind"], one["devices"], one["elements"]) for one in found] == [
        ("all-reduce", 4, 100), ("all-gather", 4, 100),
    ]  # fmt: skip
