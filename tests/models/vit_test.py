import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vitcls.errors import UserError
from vitcls.models import vit
from vitcls.models.vit import ViT
from vitcls.models.vit_config import ACTIVATIONS, ViTConfig, vit_config

TINY = ViTConfig(
    image_size=(8, 12),
    patch_size=(4, 4),
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=24,
    num_classes=5,
)
EVERYTHING = dataclasses.replace(
    TINY,
    prefix_tokens=("cls", "reg3"),
    pool="cls_mean",
    mlp="swiglu",
    pre_norm=True,
    qkv_bias=False,
    layer_scale=True,
)


TWO_HEADS = dataclasses.replace(TINY, prefix_tokens=("cls", "dist"), pool="cls_dist")


def images(batch=4, config=TINY, seed=0):
    shape = (batch, *config.image_size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fresh(config):
    """Variables as training starts with them."""
    run = jax.jit(ViT(config).init, static_argnames="train")
    return run(jax.random.key(1), images(config=config), train=False)


@functools.cache
def init(config, scale=0.3):
    """Variables without zeros, so that every parameter matters."""
    rng = np.random.default_rng(2)

    def add_noise(leaf):
        return np.asarray(leaf) + scale * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree.map(add_noise, fresh(config))


def apply(model, x, *, train=False, keys=None):
    """Logits with the variables of `init`."""
    run = jax.jit(model.apply, static_argnames="train")
    return run(init(model.config), x, train=train, keys=keys)


def shapes(config):
    init = functools.partial(ViT(config).init, jax.random.key(0), train=False)
    variables = jax.eval_shape(init, images(config=config))
    return {name: leaf.shape for name, leaf in flatten_dict(variables["params"], sep="/").items()}


def test_parameter_names_and_shapes_are_fixed():
    layer = {
        "layernorm_before/scale": (16,),
        "layernorm_before/bias": (16,),
        "attention/qkv/kernel": (16, 48),
        "attention/qkv/bias": (48,),
        "attention/output/kernel": (16, 16),
        "attention/output/bias": (16,),
        "layernorm_after/scale": (16,),
        "layernorm_after/bias": (16,),
        "mlp/intermediate/kernel": (16, 24),
        "mlp/intermediate/bias": (24,),
        "mlp/output/kernel": (24, 16),
        "mlp/output/bias": (16,),
    }
    assert shapes(TINY) == {
        "embeddings/patch_embedding/kernel": (48, 16),
        "embeddings/patch_embedding/bias": (16,),
        "embeddings/cls_token": (1, 1, 16),
        "embeddings/position_embeddings": (1, 7, 16),
        **{f"encoder/layer_{i}/{name}": shape for i in range(2) for name, shape in layer.items()},
        "layernorm/scale": (16,),
        "layernorm/bias": (16,),
        "classifier/kernel": (16, 5),
        "classifier/bias": (5,),
    }


def test_options_add_and_remove_parameters():
    plain, full = shapes(TINY), shapes(EVERYTHING)
    assert full.keys() - plain.keys() == {
        "embeddings/register_tokens",
        "layernorm_pre/scale",
        "layernorm_pre/bias",
        *(f"encoder/layer_{i}/layer_scale_{b}" for i in range(2) for b in ("attention", "mlp")),
    }
    assert plain.keys() - full.keys() == {f"encoder/layer_{i}/attention/qkv/bias" for i in range(2)}
    assert full["embeddings/register_tokens"] == (1, 3, 16)
    assert full["embeddings/position_embeddings"] == (1, 7, 16)  # registers have no position
    assert full["encoder/layer_0/mlp/intermediate/kernel"] == (16, 48)  # gate and values
    assert full["classifier/kernel"] == (32, 5)  # class token and mean


def test_bare_patches_and_two_heads_change_parameters():
    plain = shapes(TINY)
    changed = shapes(dataclasses.replace(TWO_HEADS, patch_bias=False, final_norm=False))
    assert changed.keys() - plain.keys() == {
        "embeddings/dist_token",
        "distillation_classifier/kernel",
        "distillation_classifier/bias",
    }
    assert plain.keys() - changed.keys() == {
        "embeddings/patch_embedding/bias",
        "layernorm/scale",
        "layernorm/bias",
    }
    assert changed["embeddings/position_embeddings"] == (1, 8, 16)  # the token has a position


@pytest.mark.parametrize(
    ("name", "num_params"),
    # With 1000 classes at 224 pixels; from timm's model table.
    [
        ("vit_ti16", 5_717_416),
        ("vit_s16", 22_050_664),
        ("vit_b16", 86_567_656),
        ("vit_b32", 88_224_232),
        ("vit_l16", 304_326_632),
        ("vit_h14", 632_045_800),
    ],
)
def test_sizes_have_the_published_number_of_parameters(name, num_params):
    model = ViT(vit_config(name, num_classes=1000, image_size=(224, 224)))
    init = functools.partial(model.init, jax.random.key(0), train=False)
    variables = jax.eval_shape(init, jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == num_params


def test_first_loss_is_log_num_classes():
    logits = jax.jit(ViT(TINY).apply, static_argnames="train")(fresh(TINY), images(), train=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4))
    np.testing.assert_allclose(loss, math.log(5), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "dim"), [({}, 16), ({"pool": "mean"}, 16), ({"pool": "cls_mean"}, 32)]
)
def test_without_a_head_features_come_out(changes, dim):
    config = dataclasses.replace(TINY, num_classes=0, **changes)
    features = apply(ViT(config, dtype=jnp.bfloat16), images())
    assert features.shape == (4, dim)
    assert features.dtype == jnp.float32


def test_patch_embedding_is_a_convolution():
    kernel = np.random.default_rng(3).normal(size=(4, 4, 3, 16)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        images(), kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    config = dataclasses.replace(TINY, prefix_tokens=(), pool="mean")
    params = {
        "patch_embedding": {"kernel": kernel.reshape(48, 16), "bias": jnp.zeros(16)},
        "position_embeddings": jnp.zeros((1, 6, 16)),
    }
    tokens = vit.Embeddings(config, jnp.float32).apply({"params": params}, images())
    np.testing.assert_allclose(tokens, expected.reshape(4, 6, 16), atol=1e-5)


def test_gelu_is_the_exact_one():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, atol=1e-6)


def test_the_last_layer_computes_only_the_class_token():
    """Its features equal those of a network that computes all tokens, as pool="cls_mean" does."""
    config = dataclasses.replace(TINY, num_classes=0)
    features = apply(ViT(config), images())
    whole = apply(ViT(dataclasses.replace(config, pool="cls_mean")), images())
    np.testing.assert_allclose(features, whole[:, :16], atol=1e-5)


def test_mean_pool_leaves_prefix_tokens_out():
    x = np.random.default_rng(0).normal(size=(2, 10, 16)).astype(np.float32)
    config = dataclasses.replace(TINY, prefix_tokens=("cls", "reg3"), pool="cls_mean")
    pooled = vit.pool(x, lambda x: x, config)
    expected = np.concatenate([x[:, 0], x[:, 4:].mean(axis=1)], axis=-1)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_two_heads_give_the_mean_of_their_logits():
    """Each head reads its own token, the class token's first."""
    bare = dataclasses.replace(TWO_HEADS, num_classes=0)
    params = init(TWO_HEADS)["params"]
    backbone = {name: value for name, value in params.items() if "classifier" not in name}
    features = jax.jit(functools.partial(ViT(bare).apply, train=False))(
        {"params": backbone}, images()
    )
    logits = [
        tokens @ params[head]["kernel"] + params[head]["bias"][np.newaxis]
        for tokens, head in zip(
            np.split(np.asarray(features), 2, axis=1),
            ("classifier", "distillation_classifier"),
            strict=True,
        )
    ]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    np.testing.assert_allclose(apply(ViT(TWO_HEADS), images()), np.mean(logits, 0), atol=1e-5)


def test_without_a_final_norm_tokens_are_pooled_as_they_are():
    """The norm of what comes out is what comes out with a norm."""
    config = dataclasses.replace(TINY, num_classes=0)
    params = init(config)["params"]
    norm = params["layernorm"]
    without = {name: value for name, value in params.items() if name != "layernorm"}
    bare = ViT(dataclasses.replace(config, final_norm=False))
    tokens = jax.jit(bare.apply, static_argnames="train")(
        {"params": without}, images(), train=False
    )
    normed = jax.nn.standardize(tokens, epsilon=config.epsilon) * norm["scale"][np.newaxis]
    np.testing.assert_allclose(
        normed + norm["bias"][np.newaxis], apply(ViT(config), images()), atol=1e-4
    )


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    ragged = dataclasses.replace(TINY, image_size=(11, 14))
    assert ragged.grid == TINY.grid
    pixels = images(config=ragged)
    params = init(TINY)
    found = jax.jit(functools.partial(ViT(ragged).apply, train=False))(params, pixels)
    np.testing.assert_array_equal(found, apply(ViT(TINY), pixels[:, :8, :12]))


def test_queries_keys_and_values_come_out_only_when_asked():
    model = ViT(EVERYTHING)
    assert isinstance(apply(model, images()), jax.Array)
    asked = functools.partial(model.apply, train=False, mutable=["intermediates"])
    _, state = jax.eval_shape(asked, init(EVERYTHING), images())
    for index in range(2):
        sown = state["intermediates"]["encoder"][f"layer_{index}"]["attention"]
        assert sown.keys() == {"q", "k", "v"}
        assert {leaf.shape for (leaf,) in sown.values()} == {(4, 1 + 3 + 6, 2, 8)}


@pytest.mark.parametrize("config", [TINY, EVERYTHING], ids=["plain", "everything"])
def test_bfloat16_computes_about_the_same(config):
    exact = apply(ViT(config), images())
    rough = apply(ViT(config, dtype=jnp.bfloat16), images())
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("config", [TINY, EVERYTHING], ids=["plain", "everything"])
def test_one_batch_is_learnt(config):
    model, tx = ViT(config), optax.adam(1e-2)
    variables = fresh(config)
    labels = jnp.arange(4)

    def loss_fn(variables):
        logits = model.apply(variables, images(), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(carry, _):
        variables, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(variables)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(variables, updates), opt_state), loss

    _, losses = jax.lax.scan(step, (variables, tx.init(variables)), length=60)
    assert losses[-1] < 0.05, losses


# Dropout and stochastic depth


def sample_keys(batch=4):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(batch))


def test_noise_acts_in_training_only():
    model = ViT(TINY, dropout_rate=0.5, drop_path_rate=0.5)
    plain = apply(ViT(TINY), images())
    np.testing.assert_array_equal(apply(model, images(), keys=sample_keys()), plain)
    assert np.any(apply(model, images(), train=True, keys=sample_keys()) != plain)


@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.9)], ids=["dropout", "drop path"])
def test_noise_does_not_depend_on_how_the_batch_is_split(rates):
    model = ViT(TINY, jnp.float32, *rates)
    whole = apply(model, images(), train=True, keys=sample_keys())
    halves = [
        apply(model, images()[half], train=True, keys=sample_keys()[half])
        for half in (slice(2), slice(2, 4))
    ]
    np.testing.assert_allclose(np.concatenate(halves), whole, atol=1e-5)


def test_every_site_and_every_sample_draws_its_own_mask():
    x = jnp.ones((4, 100))
    masks = [vit.dropout(x, sample_keys(), site=s, rate=0.5, shape=(100,)) for s in range(3)]
    assert len({row.tobytes() for mask in masks for row in np.asarray(mask)}) == 12


def test_dropout_keeps_the_mean():
    x = jnp.ones((8, 50, 50))
    dropped = vit.dropout(x, sample_keys(8), site=0, rate=0.2, shape=(50, 50))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.8)}
    assert abs(dropped.mean() - 1) < 0.02


def test_stochastic_depth_drops_whole_branches_and_rises_with_depth():
    config = dataclasses.replace(TINY, depth=3, num_classes=0)
    keys = sample_keys(64)
    run = functools.partial(
        ViT(config, drop_path_rate=0.8).apply,
        train=True,
        capture_intermediates=lambda module, _: isinstance(module, vit.Embeddings | vit.Layer),
    )
    _, state = jax.jit(run)(init(config), images(64), keys=keys)
    sown = state["intermediates"]
    tokens = [sown["embeddings"]["__call__"][0]]
    tokens += [sown["encoder"][f"layer_{index}"]["__call__"][0] for index in range(3)]
    unchanged = [
        np.mean(np.all(np.asarray(before[:, :1] == after[:, :1]), axis=(1, 2)))
        for before, after in itertools.pairwise(tokens)
    ]
    # A layer is the identity where both branches are dropped: rates 0, 0.4 and 0.8, squared.
    np.testing.assert_allclose(unchanged, [0, 0.16, 0.64], atol=0.15)


# PatchDropout


def test_every_sample_keeps_its_prefix_and_as_many_patches_of_its_own():
    tokens = np.random.default_rng(0).normal(size=(400, 3 + 20, 2)).astype(np.float32)
    kept = jax.jit(functools.partial(vit.drop_patches, site=9, rate=0.4, num_prefix=3))
    some = np.asarray(kept(tokens, sample_keys(400)))
    assert some.shape == (400, 3 + 12, 2)
    np.testing.assert_array_equal(some[:, :3], tokens[:, :3])
    is_kept = np.any(np.all(tokens[:, 3:, None] == some[:, None, 3:], axis=-1), axis=-1)
    assert np.all(is_kept.sum(1) == 12)  # no patch twice, and none of another sample
    assert len(np.unique(is_kept, axis=0)) > 390
    deviation = np.sqrt(400 * 0.6 * 0.4)
    np.testing.assert_allclose(is_kept.sum(0), 400 * 0.6, atol=4 * deviation)
    np.testing.assert_array_equal(kept(tokens[5:7], sample_keys(400)[5:7]), some[5:7])


def test_patches_are_dropped_in_training_only_and_in_all_layers():
    model = ViT(EVERYTHING, patch_dropout_rate=0.5)
    plain = apply(ViT(EVERYTHING), images())
    np.testing.assert_array_equal(apply(model, images(), keys=sample_keys()), plain)
    run = functools.partial(model.apply, train=True, mutable=["intermediates"])
    logits, state = jax.jit(run)(init(EVERYTHING), images(), keys=sample_keys())
    assert np.all(np.any(logits != plain, axis=1))
    layers = state["intermediates"]["encoder"].values()
    assert [layer["attention"]["k"][0].shape[1] for layer in layers] == [1 + 3 + 3] * 2


def test_which_patches_are_kept_decides_the_logits_not_their_order():
    """As if the others had never been there: attention and pooling see what is kept."""
    config = dataclasses.replace(TINY, pool="mean", depth=1)
    variables, keys = init(config), sample_keys()
    model = ViT(config, patch_dropout_rate=0.99)  # one patch is the fewest
    logits = jax.jit(functools.partial(model.apply, train=True))(variables, images(), keys=keys)
    positions = np.arange(6.0)[None, :, None] + np.zeros((4, 1, 1))
    kept = vit.drop_patches(positions, keys, site=1 + 4, rate=0.99, num_prefix=0)
    small = ViT(dataclasses.replace(config, image_size=(4, 4)))
    small = jax.jit(functools.partial(small.apply, train=False))
    for row, patch in enumerate(np.asarray(kept)[:, 0, 0].astype(int)):
        moved = jax.tree.map(np.array, variables)
        order = [0, 1 + patch]
        embedded = moved["params"]["embeddings"]
        embedded["position_embeddings"] = embedded["position_embeddings"][:, order]
        y, x = divmod(patch, 3)
        alone = images()[row : row + 1, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        expected = small(moved, alone)
        np.testing.assert_allclose(logits[row], expected[0], rtol=1e-4, atol=1e-4)


# Errors


def test_patch_must_divide_the_image():
    with pytest.raises(UserError, match=r"\(30, 224\) is not divisible by the patch size \(16, 16"):
        vit_config("vit_b16", num_classes=2, image_size=(30, 224))


def test_the_indivisible_size_suggests_the_nearest():
    with pytest.raises(UserError, match=r"use \(32, 224\), for example"):
        vit_config("vit_b16", num_classes=2, image_size=(30, 224))


def test_a_size_that_patches_do_not_divide_is_kept_but_not_chosen():
    ragged = dataclasses.replace(TINY, image_size=(11, 14))
    assert ragged.resized((11, 14)) == ragged
    assert ragged.resized((8, 16)).image_size == (8, 16)
    with pytest.raises(UserError, match=r"\(14, 11\) is not divisible.*use \(16, 12\)"):
        ragged.resized((14, 11))


def test_an_image_must_have_a_patch():
    with pytest.raises(UserError, match=r"image_size=\(3, 8\) is below a patch, \(4, 4\)"):
        dataclasses.replace(TINY, image_size=(3, 8))


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="num_heads=3 does not divide width=16"):
        dataclasses.replace(TINY, num_heads=3)


def test_sizes_must_be_positive():
    with pytest.raises(UserError, match="sizes must be positive"):
        dataclasses.replace(TINY, mlp_dim=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "max"}, "Unknown ViT pool 'max'"),
        ({"mlp": "moe"}, "Unknown ViT mlp 'moe'"),
        ({"activation": "gelu_tan"}, "Unknown ViT activation 'gelu_tan'. Did you mean 'gelu_tanh'"),
        ({"prefix_tokens": ("cls", "mask")}, "Unknown ViT prefix token 'mask'"),
        ({"prefix_tokens": ()}, "pool='cls' needs 'cls' among prefix_tokens"),
        ({"pool": "cls_dist"}, "pool='cls_dist' needs 'dist' among prefix_tokens"),
    ],
)
def test_unknown_options_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("name", ["vit_bb16", "vit_b", "vit_b0", "resnet50"])
def test_unknown_architectures_list_the_known(name):
    with pytest.raises(UserError, match=f"Unknown architecture '{name}'.*vit_b16.*vit_nano4"):
        vit_config(name, num_classes=2, image_size=(16, 16))


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"shape \(12, 8, 3\), this network takes \(8, 12, 3\)"):
        ViT(TINY).apply(init(TINY), jnp.zeros((1, 12, 8, 3)), train=False)


def test_noise_without_keys_is_refused():
    with pytest.raises(UserError, match="need keys, one per sample"):
        ViT(TINY, dropout_rate=0.1).apply(init(TINY), images(), train=True)
