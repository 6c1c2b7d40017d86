"""Parameters are divided by name and put together again; LoRA adds what its paper says."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vitcls.errors import UserError
from vitcls.models import resnet, vit, vit_config
from vitcls.step import adapt

PARAMS = {"encoder": {"layer_0": {"kernel": 1, "bias": 2}}, "classifier": {"kernel": 3}}


def test_split_and_merge_are_inverse():
    trained, frozen = adapt.split(PARAMS, "encoder/.*")
    assert trained == {"classifier": {"kernel": 3}}
    assert frozen == {"encoder": {"layer_0": {"kernel": 1, "bias": 2}}}
    assert adapt.merge(trained, frozen) == PARAMS


def test_nothing_is_frozen_without_a_pattern():
    assert adapt.split(PARAMS, "") == (PARAMS, {})
    assert adapt.merge(PARAMS, {}) == PARAMS


def test_pattern_matches_whole_names():
    _, frozen = adapt.split(PARAMS, ".*/bias")
    assert len(jax.tree.leaves(frozen)) == 1
    with pytest.raises(UserError, match="matches no parameter"):
        adapt.split(PARAMS, "encoder")


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="nothing is left to train"):
        adapt.split(PARAMS, ".*")
    with pytest.raises(UserError, match="freezes all that adapt.train='head' trains"):
        adapt.split(PARAMS, "classifier/.*", train="head")


def test_freezing_what_is_not_trained_is_refused():
    message = "adapt.freeze='encoder/.*' has no effect: adapt.train='head' trains nothing that"
    with pytest.raises(UserError, match=re.escape(message)):
        adapt.split(PARAMS, "encoder/.*", train="head")


def test_subtree_keeps_what_the_other_tree_has():
    assert adapt.subtree(PARAMS, {"classifier": {"kernel": None}}) == {"classifier": {"kernel": 3}}


CONFIG = vit_config.vit_config("vit_mu4", num_classes=5, image_size=(8, 8))


@functools.cache
def vit_params(remat="none", depth=2):
    """A network of random weights, head included, and its parameters."""
    config = dataclasses.replace(CONFIG, depth=depth)
    model = vit.ViT(config, remat=remat)
    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params["classifier"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 5))
    return model, params


@pytest.mark.parametrize(
    ("train", "freeze", "trained"),
    [
        ("head", "", {"classifier/kernel", "classifier/bias"}),
        (
            "attention",
            ".*/bias",
            {
                "classifier/kernel",
                "encoder/layer_0/attention/qkv/kernel",
                "encoder/layer_0/attention/output/kernel",
            },
        ),
        (
            "bias",
            "encoder/.*",
            {
                "classifier/kernel",
                "classifier/bias",
                "layernorm/bias",
                "embeddings/patch_embedding/bias",
            },
        ),
        ("layernorm/.*", "classifier/.*", {"layernorm/scale", "layernorm/bias"}),
    ],
)
def test_what_is_trained_has_names(train, freeze, trained):
    _, params = vit_params(depth=1)
    parts = adapt.split(params, freeze, train=train)
    assert set(adapt.names(parts[0])) == trained
    assert sorted(adapt.names(adapt.merge(*parts))) == sorted(adapt.names(params))


def test_layers_are_numbered_from_the_embeddings_to_the_head():
    """As BEiT numbers them: embeddings 0, block l at l + 1, head at depth + 1."""
    _, params = vit_params()
    numbers = adapt.layer_numbers(params)
    assert {number for name, number in numbers.items() if name.startswith("embeddings/")} == {0}
    for layer in (0, 1):
        prefix = f"encoder/layer_{layer}/"
        found = {number for name, number in numbers.items() if name.startswith(prefix)}
        assert found == {layer + 1}
    assert numbers["layernorm/scale"] == numbers["classifier/kernel"] == 3


def test_stages_of_a_resnet_are_its_layers():
    config = resnet.resnet_config("resnet18", num_classes=5, image_size=(32, 32))
    model = resnet.ResNet(config)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    numbers = adapt.layer_numbers(shapes["params"])
    assert numbers["embedder/convolution/kernel"] == 0
    stages = {int(name.split("_")[1][0]): n for name, n in numbers.items() if "/stage_" in name}
    assert stages == {0: 1, 1: 2, 2: 3, 3: 4}
    assert numbers["classifier/bias"] == 5


def test_rate_factors_multiply_and_count_frozen_layers():
    _, params = vit_params()
    trained, frozen = adapt.split(params, "(classifier|encoder/layer_1)/.*")
    factors = adapt.lr_factors(
        trained, frozen, lr_scale=((".*/kernel", 10.0), ("embeddings/.*", 2.0)), layer_decay=0.5
    )
    assert set(factors) == set(adapt.names(trained))
    assert factors["layernorm/scale"] == 1
    assert factors["encoder/layer_0/mlp/output/bias"] == 0.25
    assert factors["encoder/layer_0/mlp/output/kernel"] == 2.5
    assert factors["embeddings/patch_embedding/kernel"] == 0.125 * 20
    assert adapt.lr_factors(trained, frozen, lr_scale=(), layer_decay=1.0) is None
    with pytest.raises(UserError, match="adapt.lr_scale='classifier/.*' matches no parameter"):
        adapt.lr_factors(trained, frozen, lr_scale=(("classifier/.*", 2.0),), layer_decay=1.0)


def logits(apply, params):
    images = jax.random.normal(jax.random.key(3), (4, 8, 8, 3))
    return np.asarray(jax.jit(functools.partial(apply, train=True))({"params": params}, images))


def lora(params, targets=".*/(attention|mlp)/.*/kernel", train="head"):
    parts = adapt.split(params, train=train)
    return adapt.add_lora(*parts, jax.random.key(2), rank=4, alpha=6.0, targets=targets)


@pytest.mark.slow
def test_lora_changes_nothing_at_first():
    model, params = vit_params()
    variables = adapt.merge(*lora(params))
    adapted = logits(adapt.with_lora(model.apply), variables)
    np.testing.assert_allclose(adapted, logits(model.apply, params), rtol=2e-6)  # fused otherwise
    jax.tree.map(np.testing.assert_array_equal, adapt.fold_lora(variables), params)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_folded_lora_equals_the_adapted_network(remat):
    model, params = vit_params(remat)
    trained, frozen = lora(params)
    flat = traverse_util.flatten_dict(trained)
    for index, path in enumerate(sorted(flat)):
        if path[-1] == "lora_b":
            key = jax.random.fold_in(jax.random.key(4), index)
            flat[path] = 0.1 * jax.random.normal(key, flat[path].shape)
    variables = adapt.merge(traverse_util.unflatten_dict(flat), frozen)
    before = jax.tree.map(np.asarray, variables)
    adapted = logits(adapt.with_lora(model.apply), variables)
    folded = adapt.fold_lora(variables)
    np.testing.assert_allclose(adapted, logits(model.apply, folded), atol=1e-5)
    assert np.abs(adapted - logits(model.apply, params)).max() > 0.1
    # By the paper's equation 3, by hand.
    qkv = before["encoder"]["layer_1"]["attention"]["qkv"]
    expected = qkv["kernel"] + 6 / 4 * qkv["lora_a"] @ qkv["lora_b"]
    np.testing.assert_allclose(
        folded["encoder"]["layer_1"]["attention"]["qkv"]["kernel"], expected, atol=1e-6
    )
    assert qkv["lora_a"].shape == (32, 4) and qkv["lora_b"].shape == (4, 96)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_lora_begins_with_factors_as_torch_begins_with_kernels():
    """Even up to 1 / sqrt(D), as `torch.nn.Linear` and the paper's own code; each its own."""
    flat = traverse_util.flatten_dict(lora(vit_params()[1])[0])
    drawn = {path: np.asarray(leaf) for path, leaf in flat.items() if path[-1] == "lora_a"}
    for a in drawn.values():
        bound = 1 / np.sqrt(a.shape[0])
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.2)
    assert len({a.flat[0] for a in drawn.values()}) == len(drawn) == 8


def test_lora_trains_its_factors_and_the_head():
    trained, frozen = lora(vit_params()[1])
    leaves = {name.rsplit("/", 1)[-1] for name in adapt.names(trained) if "encoder" in name}
    assert leaves == {"lora_a", "lora_b"}
    assert "encoder/layer_0/attention/qkv/kernel" in adapt.names(frozen)


@pytest.mark.parametrize(
    ("train", "targets", "message"),
    [
        ("head", "nothing", "adapt.lora_targets='nothing' matches no parameter"),
        ("attention", ".*/qkv/kernel", "qkv/kernel, which is trained itself"),
        ("head", ".*/qkv/bias", "qkv/bias, which is not the kernel of a dense layer"),
        ("head", ".*position_embeddings", "which is not the kernel of a dense layer"),
    ],
)
def test_lora_where_it_cannot_be_is_refused(train, targets, message):
    with pytest.raises(UserError, match=message):
        lora(vit_params()[1], targets, train)


def test_lora_of_a_convolution_is_refused():
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 3, 4))},
        "classifier": {"kernel": jnp.zeros((4, 2))},
    }
    with pytest.raises(UserError, match="conv/kernel, which is not the kernel of a dense layer"):
        lora(params, "conv/kernel")


def test_held_parameters_have_no_gradient():
    params = {"encoder": {"kernel": jnp.ones(3)}, "classifier": {"kernel": jnp.ones(3)}}

    def loss(params):
        held = adapt.hold_backbone(params)
        return jnp.sum(held["encoder"]["kernel"] * held["classifier"]["kernel"])

    assert not jax.grad(loss)(params)["encoder"]["kernel"].any()
    assert jax.grad(loss)(params)["classifier"]["kernel"].all()
