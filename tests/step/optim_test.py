"""Optimizers and schedules do what optax, called by hand, does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitcls.errors import UserError
from vitcls.step import optim

PARAMS = {
    "layer": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "norm": {"scale": jnp.full(3, 2.0)},
}
GRADS = jax.tree.map(lambda p: jnp.sin(p + 1), PARAMS)


def make(
    name,
    *,
    weight_decay=0.0,
    clip_norm=0.0,
    decay=".*/kernel",
    lr=0.1,
    lr_factors=None,
    l2_sp=None,
    **args,
):
    return optim.make_optimizer(
        name,
        optax.constant_schedule(lr),
        params=PARAMS,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
        args=args,
        lr_factors=lr_factors,
        l2_sp=l2_sp,
    )


def two_updates(tx, start=PARAMS):
    state, params = tx.init(start), start
    for _ in range(2):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("name", "args", "reference"),
    [
        ("adamw", {"b2": 0.95}, lambda: optax.adamw(0.1, b2=0.95, weight_decay=0.0)),
        ("adam", {}, lambda: optax.adam(0.1)),
        ("sgd", {"momentum": 0.9}, lambda: optax.sgd(0.1, momentum=0.9)),
        ("lion", {}, lambda: optax.lion(0.1, weight_decay=0.0)),
    ],
)
def test_equals_optax(name, args, reference):
    assert_equal(two_updates(make(name, **args)), two_updates(reference()))


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_optimizer_of_optax_can_be_driven(name):
    """By a schedule, under `jit`, with a state that keeps its types, with weight decay."""
    optim.check_args(name, {})
    tx = make(name, weight_decay=0.1, clip_norm=1.0)

    def update(params, state):
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    before = jax.eval_shape(lambda params: (params, tx.init(params)), PARAMS)
    types = [
        jax.tree.map(lambda x: (x.shape, x.dtype), t)
        for t in (before, jax.eval_shape(update, *before))
    ]
    assert types[0] == types[1]


@pytest.mark.parametrize("name", ["adafactor", "lamb", "muon", "radam", "rmsprop", "adan"])
def test_more_of_optax_takes_sound_steps(name):
    params = two_updates(make(name, weight_decay=0.1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert not np.array_equal(params["layer"]["kernel"], PARAMS["layer"]["kernel"])


@pytest.mark.parametrize("name", ["lbfgs", "sophia", "schedule_free_adamw"])
def test_optimizers_that_cannot_be_driven_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=f"optim.name='{name}' cannot be used here: it"):
        optim.check_args(name, {})


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adam", "muon", "adadelta", "novograd"])
def test_weight_decay_reaches_kernels_only(name):
    plain, decayed = two_updates(make(name)), two_updates(make(name, weight_decay=0.1))
    assert_equal(plain["layer"]["bias"], decayed["layer"]["bias"])
    assert_equal(plain["norm"], decayed["norm"])
    assert not np.array_equal(plain["layer"]["kernel"], decayed["layer"]["kernel"])


def test_sgd_weight_decay_is_added_to_the_gradient():
    tx = make("sgd", weight_decay=0.5)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    expected = -0.1 * (GRADS["layer"]["kernel"] + 0.5 * PARAMS["layer"]["kernel"])
    np.testing.assert_allclose(updates["layer"]["kernel"], expected, rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    tx = make("sgd", clip_norm=0.5, lr=1.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-6)


# BiT-HyperRule's rates by hand, for a peak of 0.003: (step, rate).
HYPERRULE = [
    (0, 0.0), (250, 0.0015), (500, 0.003), (2_999, 0.003), (3_000, 3e-4), (5_999, 3e-4),
    (6_000, 3e-5), (8_999, 3e-5), (9_000, 3e-6), (9_999, 3e-6),
]  # fmt: skip


def test_step_schedule_divides_by_10_at_30_60_and_90_percent_of_all_steps():
    schedule = optim.make_schedule("step", lr=0.003, warmup_steps=500, total_steps=10_000)
    rates = [float(schedule(step)) for step, _ in HYPERRULE]
    np.testing.assert_allclose(rates, [rate for _, rate in HYPERRULE], rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 40])
def test_step_schedule_divides_where_it_should_whatever_the_warm_up(warmup_steps):
    """Also where the first division falls into the warm-up: what follows is as it would be."""
    schedule = optim.make_schedule("step", lr=2.0, warmup_steps=warmup_steps, total_steps=100)
    rates = [float(schedule(step)) for step in (40, 59, 60, 89, 90)]
    np.testing.assert_allclose(rates, [0.2, 0.2, 0.02, 0.02, 0.002], rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "step"])
def test_a_restarted_schedule_is_two_one_after_the_other(name):
    make = functools.partial(optim.make_schedule, name, lr=2.0, warmup_steps=10)
    whole = make(total_steps=90, restarts=(50,))
    first, second = make(total_steps=50), make(total_steps=40)
    rates = [float(whole(step)) for step in range(91)]
    expected = [float(first(step)) for step in range(50)]
    expected += [float(second(step)) for step in range(41)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedule_warms_up_then_ends_where_it_should(name):
    schedule = optim.make_schedule(name, lr=2.0, warmup_steps=10, total_steps=50)
    warmup = [float(schedule(step)) for step in range(11)]
    np.testing.assert_allclose(warmup, np.arange(11) / 10 * 2.0, rtol=1e-6)
    end, middle = float(schedule(50)), float(schedule(30))
    assert end == pytest.approx(2.0 if name == "constant" else 0.0, abs=1e-6)
    assert middle == pytest.approx(2.0 if name == "constant" else 1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("adamv", {}, "Unknown optimizer optim.name 'adamv'. Did you mean 'adam"),
        ("sgd", {"momentun": 0.9}, "Did you mean 'momentum'?"),
        ("adamw", {"weight_decay": 0.1}, "optim.args.weight_decay has a field of its own"),
        ("adamw", {"b1": "high"}, "optim.args={'b1': 'high'} does not suit adamw"),
        ("sgd", {"momentum": "high"}, "does not suit sgd"),
    ],
)
def test_mistakes_are_named(name, args, message):
    with pytest.raises(UserError) as error:
        optim.check_args(name, args)
    assert message in str(error.value)


def test_decay_pattern_without_a_match_lists_the_names():
    with pytest.raises(UserError, match="optim.decay='kernels' matches no parameter") as error:
        make("adamw", weight_decay=0.1, decay="kernels")
    assert "layer/kernel" in str(error.value)


FACTORS = {"layer/kernel": 0.5, "layer/bias": 2.0, "norm/scale": 1.0}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_factors_are_learning_rates_of_their_own(name):
    """Weight decay that is decoupled shrinks with them."""
    got = two_updates(make(name, weight_decay=0.1, lr_factors=FACTORS))
    by_rate = {
        factor: two_updates(make(name, weight_decay=0.1, lr=0.1 * factor))
        for factor in (0.5, 1.0, 2.0)
    }
    expected = {
        "layer": {
            "kernel": by_rate[0.5]["layer"]["kernel"],
            "bias": by_rate[2.0]["layer"]["bias"],
        },
        "norm": by_rate[1.0]["norm"],
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_l2_sp_is_the_gradient_of_its_penalty():
    start = {"encoder": {"w": jnp.array([1.0, -2.0])}, "classifier": {"w": jnp.zeros(2)}}
    params = {"encoder": {"w": jnp.array([3.0, 1.0])}, "classifier": {"w": jnp.array([4.0, -1.0])}}

    def penalty(params):
        moved = params["encoder"]["w"] - start["encoder"]["w"]
        return 0.3 / 2 * jnp.sum(moved**2) + 0.7 / 2 * jnp.sum(params["classifier"]["w"] ** 2)

    tx = optim.pull_to_start(optim.L2SP(0.3, 0.7))
    grads, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(start), params)
    expected = jax.tree.map(lambda g: 1 + g, jax.grad(penalty)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), grads, expected)
    assert_equal(state, start)


def test_l2_sp_alone_leads_back_to_the_start():
    tx = make("sgd", l2_sp=optim.L2SP(1.0, 1.0), lr=0.5)
    state, params = tx.init(PARAMS), jax.tree.map(lambda p: p + 1, PARAMS)
    for _ in range(40):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, PARAMS)


def test_a_probe_trains_the_head_and_then_all_start_anew():
    """As two runs: an optimizer of the head alone, then another one from where it ended."""
    head = {"classifier": {"kernel": jnp.full((3, 2), 0.5)}}
    start, grads = PARAMS | head, GRADS | jax.tree.map(jnp.cos, head)
    options = dict(params=start, weight_decay=0.1, decay=".*/kernel", clip_norm=1.0, args={})
    probe = optim.make_optimizer("adamw", optax.constant_schedule(0.3), **options)
    main = optim.make_optimizer("adamw", optax.linear_schedule(0.0, 0.1, 4), **options)

    def updates(tx, params, grads, num):
        update, state = jax.jit(tx.update), tx.init(params)
        for _ in range(num):
            changes, state = update(grads, state, params)
            params = optax.apply_updates(params, changes)
        return params

    tx = optim.probe_first(probe, main, num_steps=2)
    probed = PARAMS | updates(probe, head, {"classifier": grads["classifier"]}, 2)
    assert_equal(updates(tx, start, grads, 2), probed)
    assert_equal(updates(tx, start, grads, 5), updates(main, probed, grads, 3))
