"""Properties of the step: device count, overfitting, freezing, averaging, per-image randomness."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitcls.augment import prepare as augment
from vitcls.logs.parameters import bytes_per_device
from vitcls.models import resnet, vit, vit_config
from vitcls.step import adapt, optim, sharding
from vitcls.step import train_step as steps

NUM_CLASSES = 5
NORMALISE = functools.partial(augment.normalise, rescale=1 / 255, mean=(0.5,) * 3, std=(0.25,) * 3)
CONFIG = vit_config.ViTConfig(
    image_size=(8, 12),
    patch_size=(4, 4),
    width=32,
    depth=1,
    num_heads=2,
    mlp_dim=64,
    num_classes=NUM_CLASSES,
)


RESNET = resnet.ResNetConfig(
    image_size=(8, 12),
    embedding_size=8,
    hidden_sizes=(16,),
    depths=(1,),
    layer_type="basic",
    num_classes=NUM_CLASSES,
)


def make_batch(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 8, 12, 3), np.uint8),
        "targets": np.eye(NUM_CLASSES, dtype=np.float32)[rng.integers(0, NUM_CLASSES, size)],
        "mask": np.ones(size, np.float32),
    }


def init(model: vit.ViT | resnet.ResNet) -> dict:
    return jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), jnp.zeros((1, 8, 12, 3))
    )


class Run:
    """A state and a compiled step on a mesh."""

    def __init__(
        self,
        *,
        data=1,
        fsdp=1,
        depth=1,
        dropout=0.0,
        freeze="",
        ema_decay=0.0,
        lr=1e-2,
        name="adamw",
        model=None,
        num_passes=1,
        split=adapt.split,
        probe_steps=0,
        **augmentation,
    ):
        self.mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
        config = dataclasses.replace(CONFIG, depth=depth)
        model = model or vit.ViT(config, dropout_rate=dropout, drop_path_rate=dropout)
        variables = init(model)
        # A random head: with the zero head all images get the same logits at first.
        head = variables["params"]["classifier"]
        head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
        split = functools.partial(adapt.split, freeze=freeze) if freeze else split
        tx = optim.make_optimizer(
            name,
            optax.constant_schedule(lr),
            params=split(variables["params"])[0],
            weight_decay=0.01,
            decay=".*/kernel",
            clip_norm=1.0,
            args={},
        )
        if probe_steps:
            tx = optim.probe_first(tx, tx, num_steps=probe_steps)
        state = steps.init_state(variables, tx, split=split, use_ema=ema_decay > 0)
        shardings = sharding.state_shardings(state, self.mesh)
        self.state = jax.device_put(state, shardings)
        self.num_traces = 0
        prepare = augment.make_prepare(NORMALISE, flip=True, label_smoothing=0.1, **augmentation)
        prepare = sharding.on_each_device(prepare, self.mesh)
        step = steps.make_train_step(
            prepare,
            steps.make_loss_fn(adapt.with_lora(model.apply)),
            tx,
            key=jax.random.key(2),
            schedule=optax.constant_schedule(lr),
            ema_decay=ema_decay,
            num_passes=num_passes,
            group_size=2 if augmentation else 1,
            probe_steps=probe_steps,
        )

        def counted(state, batch):
            self.num_traces += 1
            return step(state, batch)

        self._step = jax.jit(counted, out_shardings=(shardings, sharding.replicated(self.mesh)))

    def steps(self, batch, num_steps: int) -> list[float]:
        batch = sharding.to_global(batch, self.mesh)
        losses = []
        for _ in range(num_steps):
            self.state, metrics = self._step(self.state, batch)
            losses.append(float(metrics["loss"]))
        return losses


MESHES = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (2, 4), (1, 8)]
SOME = [(8, 1), (2, 4)]  # compiling a step for each of the others would take minutes


def run_on(data: int, fsdp: int) -> Run:
    """The same run on any mesh: what one test compiles, the others find in the cache."""
    return Run(data=data, fsdp=fsdp, dropout=0.2, lr=1e-3, ema_decay=0.9)


@pytest.mark.parametrize(
    ("data", "fsdp"),
    [pytest.param(*mesh, marks=() if mesh in SOME else pytest.mark.slow) for mesh in MESHES],
)
def test_losses_do_not_depend_on_the_devices(data, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    one = run_on(1, 1).steps(make_batch(16), 10)
    many = run_on(data, fsdp).steps(make_batch(16), 10)
    np.testing.assert_allclose(many[0], one[0], atol=1e-6)
    np.testing.assert_allclose(many, one, atol=1e-4)


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_bytes_on_each_device_fall_with_fsdp(data, fsdp, monkeypatch):
    """Large arrays are split, small ones whole; so are Adam's moments, and all after a step."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    run = run_on(data, fsdp)
    if (data, fsdp) == (2, 4):
        run.steps(make_batch(16), 1)
    for name in ("params", "opt_state", "ema"):
        leaves = jax.tree.leaves(getattr(run.state, name))
        whole = sum(leaf.nbytes for leaf in leaves)
        is_small = [leaf.size < 64 or all(side % fsdp for side in leaf.shape) for leaf in leaves]
        small = sum(
            leaf.nbytes for leaf, held_whole in zip(leaves, is_small, strict=True) if held_whole
        )
        held = sum(leaf.addressable_shards[-1].data.nbytes for leaf in leaves)
        print(f"mesh {data} x {fsdp}: {name} {whole} bytes, {held} on each device")
        assert held == small + (whole - small) / fsdp
        assert held == bytes_per_device(getattr(run.state, name))  # what the log says
        assert small < 0.1 * whole


@pytest.mark.parametrize(("data", "dropout"), [(1, 0.0), (8, 0.2)])
def test_four_passes_of_32_are_one_of_128(data, dropout):
    """With small plain steps: larger ones, and Adam, make more of rounding errors of gradients."""
    batch = make_batch(128)
    batch["mask"][5:40] = 0  # passes of unequal weight
    kwargs = dict(data=data, dropout=dropout, name="sgd", lr=0.01, ema_decay=0.9)
    whole, parts = Run(**kwargs), Run(**kwargs, num_passes=4)
    losses = whole.steps(batch, 3), parts.steps(batch, 3)
    np.testing.assert_allclose(*losses, atol=1e-6)
    assert losses[0][2] != losses[0][0]
    states = jax.device_get((whole.state, parts.state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *states)


MIXED = dict(name="sgd", lr=0.1, mixup=0.4, cutmix=1.0)


@pytest.mark.slow
def test_pairs_are_mixed_the_same_on_any_devices_in_any_passes():
    batch = make_batch(64)
    batch["mask"][5:9] = 0
    whole, parts = Run(**MIXED), Run(**MIXED, data=8, num_passes=4)
    losses = whole.steps(batch, 3), parts.steps(batch, 3)
    np.testing.assert_allclose(*losses, rtol=1e-6)
    states = jax.device_get((whole.state, parts.state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *states)


@pytest.mark.parametrize("kwargs", [{}, MIXED], ids=["alone", "pairs"])
def test_passes_leave_images_where_they_are(kwargs):
    """Every device divides its own rows: no image travels between devices."""
    run = Run(data=8, num_passes=4, **kwargs)
    batch = sharding.to_global(make_batch(64), run.mesh)
    compiled = run._step.lower(run.state, batch).compile()
    collectives = [
        line
        for line in compiled.as_text().splitlines()
        if re.search(r"(all-(gather|to-all|reduce)|collective-permute)(-start)?\(", line)
    ]
    assert any("all-reduce" in line for line in collectives)  # of the gradients
    assert not [line for line in collectives if "u8[" in line or ",12,3]" in line]


@pytest.mark.slow
def test_passes_need_the_memory_of_one():
    def temporaries(batch_size, num_passes):
        run = Run(num_passes=num_passes, name="sgd")
        batch = sharding.to_global(make_batch(batch_size), run.mesh)
        return run._step.lower(run.state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1024, 8) < 0.3 * temporaries(1024, 1)


def test_each_pass_moves_the_batch_statistics():
    """Two passes do to the running statistics what their halves do one after the other."""
    batch, model = make_batch(16), resnet.ResNet(RESNET)
    batch["image"] = batch["image"] // 2 + batch["image"][:, :, ::-1] // 2  # a flip shows nothing
    run = Run(model=model, num_passes=2, name="sgd")
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    expected = run.state.variables()
    for half in (0, 1):
        _, updated = apply(expected, NORMALISE(batch["image"][half::2]))
        expected = expected | updated
    run.steps(batch, 1)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        jax.device_get(run.state.batch_stats),
        jax.device_get(expected["batch_stats"]),
    )


REMAT_MODELS = {
    "vit": lambda remat: vit.ViT(
        dataclasses.replace(CONFIG, depth=2), drop_path_rate=0.2, remat=remat
    ),
    "resnet": lambda remat: resnet.ResNet(RESNET, remat=remat),
}


@pytest.mark.parametrize("family", REMAT_MODELS)
def test_remat_changes_what_is_kept_and_nothing_else(family):
    variables = init(REMAT_MODELS[family]("none"))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    params["classifier"]["kernel"] += 0.1  # with a zero head no gradient passes
    batch = make_batch(32)
    keys = jax.random.split(jax.random.key(1), 32)
    kept, results = {}, {}
    for remat in ("none", "dots", "full"):
        loss_fn = steps.make_loss_fn(REMAT_MODELS[family](remat).apply)

        def loss(params, loss_fn=loss_fn):
            images = NORMALISE(batch["image"])
            return loss_fn(
                params, ({}, None), batch_stats, images, batch["targets"], batch["mask"], keys
            )

        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params, has_aux=True)[1], params)
        kept[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))
        if remat != "dots":  # compiling takes long, and it differs only in what it keeps
            results[remat] = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    assert kept["full"] < 0.9 * kept["dots"] < 0.9 * 0.9 * kept["none"], kept
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        results["full"],
        results["none"],
    )


@pytest.mark.parametrize(("data", "fsdp"), [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4)])
def test_batch_statistics_are_those_of_the_global_batch(data, fsdp, monkeypatch):
    """Losses and running statistics are the same on 1 and on 8 devices, two images on each.

    With plain gradient steps: Adam's first ones make rounding errors of tiny gradients full steps.
    """
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    batch = make_batch(16)
    kwargs = dict(model=resnet.ResNet(RESNET), name="sgd", lr=1e-2, ema_decay=0.9)
    one, many = Run(**kwargs), Run(data=data, fsdp=fsdp, **kwargs)
    before = jax.device_get(one.state.batch_stats)
    losses = one.steps(batch, 1), many.steps(batch, 1)
    np.testing.assert_allclose(*losses, atol=1e-6)
    first = jax.device_get((one.state.batch_stats, many.state.batch_stats))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *first)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), before, first[0])))
    losses = one.steps(batch, 9), many.steps(batch, 9)
    np.testing.assert_allclose(*losses, atol=1e-4)


@pytest.mark.parametrize("data", [1, 8])
def test_frozen_batch_norm_leaves_its_statistics(data):
    run = Run(model=resnet.ResNet(RESNET, train_batch_norm=False), data=data, ema_decay=0.9)
    before = jax.device_get((run.state.params, run.state.batch_stats))
    run.steps(make_batch(16), 3)
    for found in (run.state.batch_stats, run.state.ema["batch_stats"]):
        jax.tree.map(np.testing.assert_array_equal, before[1], jax.device_get(found))
    moved = jax.tree.map(lambda a, b: np.any(a != b), before[0], jax.device_get(run.state.params))
    assert all(jax.tree.leaves(moved))  # scales and biases of BatchNorm too


def test_one_batch_overfits_and_the_step_compiles_once():
    run = Run()
    losses = run.steps(make_batch(16), 60)
    assert run.num_traces == 1
    smoothed_floor = -np.log(0.92) * 0.92 - 4 * 0.02 * np.log(0.02)
    assert losses[-1] < smoothed_floor + 0.1 < losses[0]


def test_masked_rows_do_not_count():
    batch = make_batch(16)
    half = {name: array[:8] for name, array in batch.items()}
    batch["mask"][8:] = 0
    batch["image"][8:] = 255
    full, alone = Run(), Run()
    np.testing.assert_allclose(full.steps(batch, 3), alone.steps(half, 3), rtol=1e-5)


def gradient_step(model, batch, *, data=1, fsdp=1, num_passes=1, **options):
    """Loss, gradient and statistics after one step of rate 1 on a mesh."""
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    variables = init(model)
    head = variables["params"]["classifier"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    tx = optax.sgd(1.0)
    step = steps.make_train_step(
        sharding.on_each_device(
            lambda keys, b: (NORMALISE(b["image"]), b["targets"], b["mask"]), mesh
        ),
        steps.make_loss_fn(model.apply, **options),
        tx,
        key=jax.random.key(0),
        schedule=optax.constant_schedule(1.0),
        ema_decay=0.9,
        num_passes=num_passes,
    )
    state = steps.init_state(variables, tx, use_ema=True)
    state = jax.device_put(state, sharding.state_shardings(state, mesh))
    new, metrics = jax.jit(step)(state, sharding.to_global(batch, mesh))
    before, new, loss = jax.device_get((state, new, metrics["loss"]))
    gradient = jax.tree.map(np.subtract, before.params, new.params)
    return loss, gradient, new.batch_stats, new.ema["batch_stats"]


def assert_close(found, expected, *, atol=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=atol), found, expected
    )


def skip(batch, *rows):
    """The batch as the loader makes it where these images cannot be read, and one without them."""
    skipped = {name: array.copy() for name, array in batch.items()}
    for array in skipped.values():
        array[list(rows)] = 0
    return skipped, {name: np.delete(array, rows, axis=0) for name, array in batch.items()}


@pytest.mark.parametrize(
    ("data", "fsdp", "options"),
    [
        (1, 1, {}),
        (8, 1, {}),
        pytest.param(2, 4, {}, marks=pytest.mark.slow),
        pytest.param(1, 1, {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param(8, 1, {"dtype": jnp.bfloat16}, marks=pytest.mark.slow),
    ],
    ids=["1", "8", "2 x 4", "remat", "bfloat16"],
)
def test_skipped_images_are_in_no_batch_statistics(data, fsdp, options, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    model = resnet.ResNet(RESNET, **options)
    skipped, without = skip(make_batch(16), 5, 6, 15)
    expected = gradient_step(model, without, may_skip=False)
    # In bfloat16 a sum's last bits depend on where it is cut.
    atol = 0.02 if "dtype" in options else 1e-5
    assert_close(gradient_step(model, skipped, data=data, fsdp=fsdp), expected, atol=atol)


@pytest.mark.parametrize("data", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("rows", [(5,), (9, 25)], ids=["one image", "a whole pass"])
def test_skipped_images_are_in_no_statistics_of_a_pass(data, rows):
    """Each pass is as if it had been made without them; one without images moves nothing."""
    model = resnet.ResNet(RESNET)
    batch, num_passes = make_batch(32), 16 // data
    skipped, _ = skip(batch, *rows)
    found = gradient_step(model, skipped, data=data, num_passes=num_passes)
    variables = init(model)
    head = variables["params"]["classifier"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    params, stats = variables["params"], variables["batch_stats"]
    loss_fn = steps.make_loss_fn(model.apply, may_skip=False)
    loss_sum, gradient = 0.0, jax.tree.map(jnp.zeros_like, params)
    for index in range(num_passes):
        kept = [row for row in range(index, 32, num_passes) if row not in rows]
        if not kept:
            continue
        images, targets, mask = (batch[name][kept] for name in ("image", "targets", "mask"))
        (loss, (_, stats)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
            params, ({}, None), stats, NORMALISE(images), targets, mask, None
        )
        loss_sum, gradient = loss_sum + loss, jax.tree.map(jnp.add, gradient, grads)
    num_images = 32 - len(rows)
    mean = jax.tree.map(lambda leaf: leaf / num_images, gradient)
    assert_close(found[:3], (loss_sum / num_images, mean, stats))


def test_without_skipped_images_no_mask_is_computed():
    """Runs that cannot skip an image compute what they did before there was a mask."""
    model, batch = resnet.ResNet(RESNET), make_batch(16)

    def program(apply, **options):
        loss_fn = steps.make_loss_fn(apply, **options)
        variables = init(model)
        args = (({}, None), variables["batch_stats"], NORMALISE(batch["image"]), batch["targets"])
        return str(jax.make_jaxpr(loss_fn)(variables["params"], *args, batch["mask"], None))

    def unmasked(*args, mask=None, **kwargs):
        return model.apply(*args, **kwargs)

    assert program(model.apply, may_skip=False) == program(unmasked, may_skip=False)
    assert program(model.apply, may_skip=False) != program(model.apply)


def test_a_class_of_weight_0_is_in_the_batch_statistics_all_the_same():
    model, batch = resnet.ResNet(RESNET), make_batch(16)
    loss_fn = functools.partial(steps.make_loss_fn, model.apply)
    variables = init(model)
    args = (({}, None), variables["batch_stats"], NORMALISE(batch["image"]), batch["targets"])
    weights = np.float32([0, 0, 1, 1, 1])
    stats = [
        jax.jit(loss_fn(class_weights=factors))(variables["params"], *args, batch["mask"], None)[1][
            1
        ]
        for factors in (None, weights)
    ]
    jax.tree.map(np.testing.assert_array_equal, *stats)


@pytest.mark.parametrize("network", ["vit", "resnet"])
@pytest.mark.parametrize(
    ("data", "num_passes"), [(1, 1), pytest.param(8, 1, marks=pytest.mark.slow), (1, 4)]
)
def test_a_batch_of_skipped_images_changes_nothing(network, data, num_passes):
    """No weight, no moment, no average, no statistic, and no count but its own."""
    model = resnet.ResNet(RESNET) if network == "resnet" else None
    run = Run(data=data, num_passes=num_passes, model=model, ema_decay=0.9)
    batch = make_batch(16)
    run.steps(batch, 1)
    before = jax.device_get(run.state)
    assert run.steps(skip(batch, *range(16))[0], 1) == [0.0]
    after = jax.device_get(run.state)
    assert (after.step, after.num_empty, after.skips) == (2, 1, before.skips)
    counts = {"step": before.step, "num_empty": before.num_empty}
    jax.tree.map(np.testing.assert_array_equal, after.replace(**counts), before)
    assert np.isfinite(run.steps(batch, 1)).all()
    assert run.num_traces == 1


def test_a_batch_of_skipped_images_moves_no_schedule():
    tx = optax.sgd(optax.linear_schedule(0.0, 1.0, 10))
    variables = {"params": {"w": jnp.asarray(1.0)}}
    step = steps.make_train_step(
        lambda keys, batch: (batch["image"], batch["targets"], batch["mask"]),
        lambda params, fixed, stats, images, targets, weights, keys: (
            params["w"] * weights.sum(), (weights.sum(), {})
        ),
        tx,
        key=jax.random.key(0), schedule=optax.linear_schedule(0.0, 1.0, 10), ema_decay=0.0,
    )  # fmt: skip
    state, batch = steps.init_state(variables, tx, use_ema=False), make_batch(2)
    rates = []
    for is_empty in (False, True, False, True):
        state, metrics = step(state, skip(batch, 0, 1)[0] if is_empty else batch)
        rates.append(float(metrics["lr"]))
        assert metrics["is_empty"] == is_empty
    np.testing.assert_allclose(rates, [0, 0.1, 0.1, 0.2], rtol=1e-6)
    assert int(optax.tree.get(state.opt_state, "count")) == 2


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (8, 1), (2, 4)])
def test_batch_of_masked_rows_only_is_no_division_by_zero(data, fsdp):
    batch = make_batch(16)
    run = Run(data=data, fsdp=fsdp, name="sgd")
    before = jax.device_get(run.state.params)
    assert run.steps(batch | {"mask": np.zeros(16, np.float32)}, 1) == [0.0]
    after = jax.device_get(run.state.params)  # decayed, and nothing else
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), after, before)
    assert np.isfinite(run.steps(batch, 2)).all()


def test_frozen_params_do_not_change():
    run = Run(depth=2, freeze="embeddings/.*|encoder/layer_0/.*", ema_decay=0.9)
    before = jax.device_get(run.state.frozen)
    trained_before = jax.device_get(run.state.params)
    run.steps(make_batch(16), 3)
    assert set(before) == {"embeddings", "encoder"}
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.state.frozen))
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), trained_before, jax.device_get(run.state.params)
    )
    assert all(jax.tree.leaves(moved["encoder"]["layer_1"]["mlp"]))
    variables = run.state.eval_variables()["params"]
    assert set(adapt.names(variables)) == set(adapt.names(run.state.variables()["params"]))


def lora(params, *, rank=2):
    parts = adapt.split(params, train="head")
    targets = ".*/(attention|mlp)/.*/kernel"
    return adapt.add_lora(*parts, jax.random.key(3), rank=rank, alpha=4.0, targets=targets)


def test_lora_leaves_the_network_as_it_was_and_evaluates_the_sum():
    run = Run(split=lora, ema_decay=0.5)
    before = jax.device_get(run.state.frozen)
    run.steps(make_batch(16), 3)
    state = jax.device_get(run.state)
    jax.tree.map(np.testing.assert_array_equal, before, state.frozen)
    attention = ("encoder", "layer_0", "attention", "qkv")
    averaged, kernel = state.ema["params"], state.frozen
    evaluated = state.eval_variables()["params"]
    for name in attention:
        averaged, kernel, evaluated = averaged[name], kernel[name], evaluated[name]
    assert averaged["lora_b"].all()
    change = 4 / 2 * averaged["lora_a"] @ averaged["lora_b"]
    np.testing.assert_allclose(evaluated["kernel"], kernel["kernel"] + change, atol=1e-6)
    shapes = jax.tree.map(jnp.shape, state.eval_variables())
    assert shapes == jax.tree.map(jnp.shape, dict(init(vit.ViT(CONFIG))))


@pytest.mark.parametrize("split", [lora, functools.partial(adapt.split, train="bias")])
def test_the_optimizer_keeps_moments_of_what_is_trained_only(split):
    state = Run(split=split).state
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert kept == pytest.approx(2 * trained, abs=16)  # and the numbers of steps
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(state.frozen))
    assert trained < 0.2 * frozen


@pytest.mark.slow
def test_a_probe_trains_the_head_as_if_the_rest_were_frozen():
    probed, frozen = Run(probe_steps=3), Run(split=functools.partial(adapt.split, train="head"))
    before = jax.device_get(probed.state.params)
    losses = [run.steps(make_batch(16), 3) for run in (probed, frozen)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    after = jax.device_get(probed.state.params)
    head = {"classifier": after.pop("classifier")}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        head,
        jax.device_get(frozen.state.params),
    )
    del before["classifier"]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    probed.steps(make_batch(16), 1)
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), jax.device_get(probed.state.params), after | head
    )
    assert moved["encoder"]["layer_0"]["mlp"]["output"]["kernel"]
    assert probed.num_traces == 1


def test_a_probe_computes_no_gradient_below_the_head():
    run = Run(probe_steps=3)
    step = jax.make_jaxpr(run._step)(run.state, make_batch(16)).jaxpr.eqns[-1].params["jaxpr"]
    conds = [eqn for eqn in step.jaxpr.eqns if eqn.primitive.name == "cond"]
    products = [
        [str(branch).count("dot_general") for branch in eqn.params["branches"]] for eqn in conds
    ]
    full, probe = products[0]  # of the loss; the optimizer's has none
    assert probe < 0.5 * full


def test_ema_warms_up_and_follows():
    average = {"w": jnp.zeros(())}
    values = []
    for step in range(3):
        average = steps.update_ema(average, {"w": jnp.ones(())}, jnp.asarray(step), 0.5)
        values.append(float(average["w"]))
    # decays 1/10, 2/11, 3/12
    np.testing.assert_allclose(values, [0.9, 1 - 0.1 * 2 / 11, 1 - 0.1 * 2 / 11 / 4], rtol=1e-6)
    late = steps.update_ema({"w": jnp.zeros(())}, {"w": jnp.ones(())}, jnp.asarray(10**6), 0.5)
    assert float(late["w"]) == 0.5


def test_ema_is_what_is_evaluated():
    run = Run(ema_decay=0.99)
    run.steps(make_batch(16), 5)
    kernel = run.state.eval_variables()["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, run.state.ema["params"]["classifier"]["kernel"])
    assert not np.array_equal(kernel, run.state.params["classifier"]["kernel"])


def test_sample_keys_depend_on_step_and_row_only():
    key = jax.random.key(0)
    keys = jax.random.key_data(steps.sample_keys(key, jnp.asarray(3), 16))
    fewer = jax.random.key_data(steps.sample_keys(key, jnp.asarray(3), 8))
    later = jax.random.key_data(steps.sample_keys(key, jnp.asarray(4), 16))
    np.testing.assert_array_equal(keys[:8], fewer)
    assert len({tuple(k) for k in np.concatenate([keys, later]).tolist()}) == 32


def test_first_loss_of_a_new_head_is_ln_k():
    model = vit.ViT(CONFIG)
    variables = init(model)
    loss_fn = steps.make_loss_fn(model.apply)
    batch = make_batch(8)
    loss_sum, (weight_sum, _) = loss_fn(
        variables["params"], ({}, None), {}, NORMALISE(batch["image"]), batch["targets"],
        batch["mask"], jax.random.split(jax.random.key(0), 8),
    )  # fmt: skip
    assert float(loss_sum / weight_sum) == pytest.approx(np.log(NUM_CLASSES), rel=1e-6)


def test_gradient_of_frozen_parameters_is_not_computed():
    """The compiled step of a frozen backbone costs less than half of the full one."""

    def flops(freeze):
        run = Run(freeze=freeze)
        batch = sharding.to_global(make_batch(16), run.mesh)
        return run._step.lower(run.state, batch).compile().cost_analysis()["flops"]

    assert flops("(embeddings|encoder)/.*") < 0.5 * flops("")


@pytest.mark.slow
def test_lora_saves_the_gradients_of_kernels():
    """A third of the products of a step, were images large: here two small factors weigh more."""
    model = vit.ViT(dataclasses.replace(CONFIG, width=64, mlp_dim=256))

    def flops(split):
        run = Run(split=split, model=model)
        batch = sharding.to_global(make_batch(64), run.mesh)
        return run._step.lower(run.state, batch).compile().cost_analysis()["flops"]

    assert flops(functools.partial(lora, rank=1)) < 0.8 * flops(adapt.split)


@pytest.mark.parametrize("probe_steps", [0, 1])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(probe_steps):
    """Of a network with BatchNorm and averages; the steps after it are as if it had not been."""
    model = resnet.ResNet(RESNET)
    batch, loss_of_nan = make_batch(16), make_batch(16)
    loss_of_nan["targets"][3, 2] = np.nan
    kwargs = dict(model=model, ema_decay=0.9, name="adamw", probe_steps=probe_steps)
    run, without = Run(**kwargs), Run(**kwargs)
    run.steps(batch, 2)
    without.steps(batch, 2)
    before = jax.device_get(run.state)
    assert not np.isfinite(run.steps(loss_of_nan, 2)).any()
    after = jax.device_get(run.state)
    assert (after.step, after.skips) == (4, {"total": 2, "in_row": 2})
    jax.tree.map(
        np.testing.assert_array_equal, after.replace(step=before.step, skips=before.skips), before
    )
    assert run.num_traces == 1
    # What is drawn goes on with the steps, so that only what does not depend on it is compared.
    run.steps(batch, 1)
    assert jax.device_get(run.state).skips == {"total": 2, "in_row": 0}
    counts = [optax.tree.get_all_with_path(r.state.opt_state, "count") for r in (run, without)]
    assert [int(n) - int(m) for (_, n), (_, m) in zip(*counts, strict=True)].count(1) >= 1


def test_an_update_is_in_place_on_cpu_and_a_selection_elsewhere():
    tx = optax.adamw(0.1)
    params = {"w": jnp.full((64, 512), 0.5)}

    def update(old, gradient):
        updates, opt_state = tx.update(gradient, old["opt_state"], old["params"])
        return {"params": optax.apply_updates(old["params"], updates), "opt_state": opt_state}

    old = {"params": params, "opt_state": tx.init(params)}

    @functools.partial(jax.jit, donate_argnums=1)
    def call(condition, old, gradient):
        return steps.update_if(condition, functools.partial(update, gradient=gradient), old)

    gradient = jax.tree.map(jnp.sin, params)
    traced = call.trace(True, old, gradient)
    lowered, elsewhere = (traced.lower(lowering_platforms=(name,)) for name in ("cpu", "cuda"))
    branches = [x.as_text().count("stablehlo.case") for x in (lowered, elsewhere)]
    assert branches[0] == branches[1] + 1
    assert not re.search(r"f32\[64,512\]\S* copy\(", lowered.compile().as_text())
    expected = jax.device_get((old, update(old, gradient)))
    for condition in (False, True):
        result = call(condition, jax.tree.map(jnp.copy, old), gradient)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), result, expected[condition]
        )


def test_a_gradient_that_overflows_is_skipped_though_its_loss_is_finite():
    def loss_fn(params, frozen, batch_stats, images, targets, weights, keys):
        return 1e-30 * jnp.exp(params["w"]) ** 2, (jnp.ones(()), {})

    tx = optax.sgd(1.0)
    state = steps.init_state({"params": {"w": jnp.asarray(0.0)}}, tx, use_ema=False)

    def prepare(key, batch):
        return batch["image"], batch["targets"], batch["mask"]

    @jax.custom_vjp
    def overflowing(x):
        return x

    overflowing.defvjp(lambda x: (x, None), lambda _, g: (jnp.inf * g,))
    for gradient, skipped in [(lambda x: x, 0), (overflowing, 1)]:

        def wrapped(params, *rest, gradient=gradient):
            return loss_fn({"w": gradient(params["w"])}, *rest)

        step = steps.make_train_step(
            prepare, wrapped, tx,
            key=jax.random.key(0), schedule=optax.constant_schedule(1.0), ema_decay=0.0,
        )  # fmt: skip
        new, metrics = step(state, make_batch(2))
        assert np.isfinite(metrics["loss"])
        assert new.skips["total"] == skipped
        assert (new.params["w"] == 0.0) == bool(skipped)
