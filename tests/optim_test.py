"""Optimizers and schedules do what optax, called by hand, does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitcls import optim
from vitcls.errors import UserError

PARAMS = {
    "layer": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "norm": {"scale": jnp.full(3, 2.0)},
}
GRADS = jax.tree.map(lambda p: jnp.sin(p + 1), PARAMS)


def make(name, *, weight_decay=0.0, clip_norm=0.0, decay=".*/kernel", lr=0.1, **args):
    return optim.make_optimizer(
        name,
        optax.constant_schedule(lr),
        params=PARAMS,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
        args=args,
    )


def two_updates(tx):
    state, params = tx.init(PARAMS), PARAMS
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


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adam"])
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
