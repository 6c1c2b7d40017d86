import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vitcls.errors import UserError
from vitcls.models.resnet import ResNet, ResNetConfig, resnet_config

TINY = ResNetConfig(
    image_size=(16, 24),
    embedding_size=4,
    hidden_sizes=(8, 12),
    depths=(1, 2),
    layer_type="bottleneck",
    num_classes=5,
)


def images(batch=4, seed=0):
    shape = (batch, *TINY.image_size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
@functools.cache
def fresh(config):
    """Variables as training starts with them."""
    return jax.jit(ResNet(config).init, static_argnames="train")(
        jax.random.key(1), images(), train=False
    )


def init(config):
    """Variables with a head and statistics of which every one matters."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.asarray(x) + rng.uniform(0, 0.3, x.shape), fresh(config))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def run(model, variables, x, *, train=False):
    """(logits, variables that changed)."""
    return model.apply(variables, x, train=train, mutable=["batch_stats"])


def test_variable_names_and_shapes_are_fixed():
    def conv_layer(name, kernel):
        norm = f"{name}/normalization"
        return {
            f"params/{name}/convolution/kernel": kernel,
            **{f"params/{norm}/{leaf}": kernel[-1:] for leaf in ("scale", "bias")},
            **{f"batch_stats/{norm}/{leaf}": kernel[-1:] for leaf in ("mean", "var")},
        }

    layers = {
        "stage_0/layer_0": [(1, 1, 4, 2), (3, 3, 2, 2), (1, 1, 2, 8)],
        "stage_1/layer_0": [(1, 1, 8, 3), (3, 3, 3, 3), (1, 1, 3, 12)],
        "stage_1/layer_1": [(1, 1, 12, 3), (3, 3, 3, 3), (1, 1, 3, 12)],
    }
    expected = conv_layer("embedder", (7, 7, 3, 4))
    for layer, kernels in layers.items():
        for index, kernel in enumerate(kernels):
            expected |= conv_layer(f"encoder/{layer}/conv_layer_{index}", kernel)
    expected |= conv_layer("encoder/stage_0/layer_0/shortcut", (1, 1, 4, 8))
    expected |= conv_layer("encoder/stage_1/layer_0/shortcut", (1, 1, 8, 12))
    expected |= {"params/classifier/kernel": (12, 5), "params/classifier/bias": (5,)}
    flat = flatten_dict(fresh(TINY), sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == expected
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("name", "num_params"),
    # With 1000 classes; from torchvision's model table.
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_sizes_have_the_published_number_of_parameters(name, num_params):
    model = ResNet(resnet_config(name, num_classes=1000, image_size=(224, 224)))
    init = functools.partial(model.init, jax.random.key(0), train=False)
    variables = jax.eval_shape(init, jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == num_params


def test_first_loss_is_log_num_classes():
    logits, _ = run(ResNet(TINY), fresh(TINY), images())
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4))
    np.testing.assert_allclose(loss, math.log(5), rtol=1e-6)


def test_without_a_head_features_come_out():
    config = dataclasses.replace(TINY, num_classes=0)
    features, _ = run(ResNet(config, dtype=jnp.bfloat16), fresh(config), images())
    assert features.shape == (4, 12)
    assert features.dtype == jnp.float32


@pytest.mark.parametrize("train", [True, False])
def test_bfloat16_computes_about_the_same(train):
    exact, _ = run(ResNet(TINY), init(TINY), images(), train=train)
    rough, updated = run(ResNet(TINY, dtype=jnp.bfloat16), init(TINY), images(), train=train)
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype(np.float32)}


def test_frozen_statistics_are_used_and_stay():
    model, variables = ResNet(TINY, train_batch_norm=False), init(TINY)
    in_training, updated = run(model, variables, images(), train=True)
    plain, _ = run(ResNet(TINY), variables, images())
    np.testing.assert_array_equal(in_training, plain)
    expected = jax.tree.map(np.float32, variables["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], expected)


def test_trained_statistics_move_in_training_only():
    variables = init(TINY)
    _, updated = run(ResNet(TINY), variables, images(), train=True)
    expected = jax.tree.map(np.float32, variables["batch_stats"])
    moved = jax.tree.map(lambda a, b: np.any(a != b), updated["batch_stats"], expected)
    assert all(jax.tree.leaves(moved))
    _, kept = run(ResNet(TINY), variables, images(), train=False)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            dict(layer_type="basic", downsample_in_first_stage=True), marks=pytest.mark.slow
        ),
        dict(downsample_in_bottleneck=True, activation="gelu"),
    ],
    ids=["bottleneck", "basic", "version 1"],
)
def test_one_batch_is_learnt(changes):
    config = dataclasses.replace(TINY, **changes)
    model, tx = ResNet(config), optax.adam(1e-2)
    variables, labels = fresh(config), jnp.arange(4)

    def loss_fn(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images(), train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updated["batch_stats"]

    @jax.jit
    def step(carry, _):
        params, batch_stats, opt_state = carry
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_stats)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    carry = variables["params"], variables["batch_stats"], tx.init(variables["params"])
    _, losses = jax.lax.scan(step, carry, length=60)
    assert losses[-1] < 0.05, losses


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_type": "wide"}, "Unknown ResNet layer_type 'wide'"),
        ({"activation": "rellu"}, "Unknown ResNet activation 'rellu'. Did you mean 'relu'"),
        (
            {"depths": (1, 2, 3)},
            r"hidden_sizes=\(8, 12\) and depths=\(1, 2, 3\) must name the same",
        ),
        ({"depths": (), "hidden_sizes": ()}, "must name the same stages"),
        ({"depths": (1, 0)}, "sizes must be positive"),
        ({"hidden_sizes": (3, 12)}, "hidden_sizes of bottlenecks at least 4"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes)


def test_unknown_architectures_list_the_known():
    with pytest.raises(UserError, match="Unknown architecture 'resnet51'.*resnet18.*resnet50"):
        resnet_config("resnet51", num_classes=2, image_size=(16, 16))


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"shape \(24, 16, 3\), this network takes \(16, 24, 3\)"):
        ResNet(TINY).init(jax.random.key(0), jnp.zeros((1, 24, 16, 3)), train=False)
