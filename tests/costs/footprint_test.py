"""What a step is said to need is what its arrays take, and what it computes."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.models import arch_config, macs
from vitcls.config.fields import default_config
from vitcls.costs import footprint
from vitcls.errors import UserError
from vitcls.run import program
from vitcls.run.network import open_model
from vitcls.run.opened import Run
from vitcls.step import sharding

NUM_CLASSES = 10


def make(*, devices=8, arch="vit_mu4", **fields) -> program.Program:
    """A program for random images; fields as group__field."""
    config = default_config()
    config.model.arch, config.data.image_size = arch, (16, 16)
    config.train.update(total_steps=10, global_batch_size=64)
    config.optim.ema_decay = 0.9
    config = program.with_fields(
        config, {name.replace("__", "."): value for name, value in fields.items()}
    )
    names = tuple(map(str, range(NUM_CLASSES)))
    _, network, processor = open_model(config, names)
    mesh = sharding.make_mesh(-1, config.mesh.fsdp, devices=jax.devices()[:devices])
    counts = np.ones(NUM_CLASSES, int)
    train_split = SimpleNamespace(class_names=names, class_counts=lambda: counts)
    return Run(config, train_split, {}, None, network, processor, mesh).make_program()


def analyse(made: program.Program) -> dict:
    return footprint.analyse(made.lower(), num_devices=made.mesh.size, num_passes=made.num_passes)


def bytes_on_one_device(tree) -> int:
    """Of real arrays, as they lie there."""
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("fsdp", [1, 4])
def test_memory_by_kind_is_that_of_the_arrays_on_the_devices(fsdp, monkeypatch, caplog):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**10)
    made = make(mesh__fsdp=fsdp, train__micro_batch=4)
    kinds = footprint.memory_by_kind(made, analyse(made))
    state = made.first_state(None)
    rows = {name: np.zeros((64, *leaf.shape), leaf.dtype) for name, leaf in made.row.items()}
    batch = sharding.to_global(rows, made.mesh)
    weights = (state.step, state.params, state.frozen, state.batch_stats)
    assert kinds["parameters"] == bytes_on_one_device(weights)
    assert kinds["optimizer"] == bytes_on_one_device(state.opt_state)
    assert kinds["average"] == bytes_on_one_device(state.ema)
    assert kinds["batch"] == 2 * bytes_on_one_device(batch)
    assert kinds["teacher"] == 0 and kinds["padding"] == 0
    assert kinds["activations and temporaries"] > 0
    assert footprint.bytes_needed(made) == sum(kinds.values())
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("DEBUG", logger="jax"):
        made.train_step(state, batch)
    assert "train_step" not in caplog.text  # the step that was looked at is the one that runs


def test_sharing_parameters_over_devices_saves_memory(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**10)
    assert footprint.state_bytes(make(mesh__fsdp=4)) < 0.5 * footprint.state_bytes(make())


@pytest.mark.slow
def test_operations_are_those_of_the_networks_products():
    config = dataclasses.replace(arch_config("vit_nano4", 16), num_classes=NUM_CLASSES)
    expected = 6 * macs(config) * 64
    flops = analyse(make(devices=1, arch="vit_nano4"))["flops"]
    # Beside the products, and without the gradient of the images, which nobody needs.
    assert 0.9 * expected < flops < 1.2 * expected


def test_every_pass_counts():
    # The optimizer, which is counted twice, is little beside so many images.
    batch = dict(train__global_batch_size=256)
    whole, parts = (analyse(make(train__micro_batch=size, **batch)) for size in (None, 16))
    assert parts["flops"] == pytest.approx(whole["flops"], rel=0.1)
    assert parts["temporaries"] < whole["temporaries"]
    for figures, times in ((whole, 1), (parts, 2)):
        assert {one["times"] for one in figures["collectives"]} == {times}


def test_gradients_are_summed_over_all_devices_once_a_pass():
    made = make(train__micro_batch=4)
    trained = sum(leaf.size for leaf in jax.tree.leaves(made.state_shapes.params))
    sums = [one for one in analyse(made)["collectives"] if one["kind"] == "all-reduce"]
    assert {one["devices"] for one in sums} == {8} and {one["dtype"] for one in sums} == {"f32"}
    per_reduction = sum(one["bytes"] for one in sums)
    assert 4 * trained <= per_reduction <= 1.05 * 4 * trained


def test_a_step_that_the_compiler_refuses_says_what_it_needs():
    class Refused:
        def __init__(self, message):
            self.message = message

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    def refused(message):
        return footprint.analyse(Refused(message), num_devices=1, num_passes=1)["refused"]

    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.5G of 15.75G hbm."
    assert refused(used) == 21.5 * 2**30
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (670.62G) exceeds available HBM (15.75G)."
    )
    assert refused(temporaries) == 670.62 * 2**30
    assert refused("RESOURCE_EXHAUSTED: no.") is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refused("INTERNAL: a bug")


def with_memory(monkeypatch, number: float) -> None:
    monkeypatch.setattr(footprint, "available_bytes", lambda mesh: number / footprint.SHARE)


@pytest.mark.parametrize(("available", "size"), [(800, 8), (799, 4), (200, 2), (100, 1)])
def test_passes_are_the_largest_that_fit(available, size, monkeypatch):
    monkeypatch.setattr(footprint, "bytes_needed", lambda made: 100 * made.pass_size)
    with_memory(monkeypatch, available)
    made = make(train__micro_batch=0)
    assert (made.pass_size, made.num_passes) == (size, 8 // size)


def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(footprint, "bytes_needed", lambda made: 100 * made.pass_size)
    with_memory(monkeypatch, 99)
    with pytest.raises(UserError, match="train.micro_batch=0: not even the smallest pass fits"):
        make(train__micro_batch=0)


def test_passes_are_not_chosen_where_they_change_the_result():
    with pytest.raises(UserError, match="BatchNorm normalises each pass by itself"):
        make(arch="resnet_mu", data__image_size=(32, 32), train__micro_batch=0)


def test_devices_that_tell_nothing_of_their_memory_are_tried():
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return None  # as jax has it where the allocator keeps no count

    devices = [Device(), Device()]
    mesh = SimpleNamespace(devices=np.array(devices), local_devices=devices)
    assert footprint.available_bytes(mesh) == np.inf
