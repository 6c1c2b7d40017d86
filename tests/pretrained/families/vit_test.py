"""The `vit` family against its reference, `transformers` in torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from tests.torch_reference import (
    apply,
    check_gradients,
    random_images,
    randomized,
    tensors,
    to_torch,
)
from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained.families.vit import VIT
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.saving import config_to_json

# name -> (fields of transformers' config, with a head, image size to run at)
CASES = {
    "not square": (
        dict(image_size=[24, 32], patch_size=[8, 4], hidden_size=32, num_attention_heads=4),
        True,
        (24, 32),
    ),
    "no head": (
        dict(image_size=32, patch_size=8, hidden_size=48, num_attention_heads=3, qkv_bias=False),
        False,
        (32, 32),
    ),
    "another size": (
        dict(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=2,
             hidden_act="gelu_pytorch_tanh"),
        True,
        (48, 64),
    ),
}  # fmt: skip
NUM_CLASSES = 7


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request, tmp_path_factory):
    """(torch model, folder that `save_pretrained` wrote, with a head, image size)."""
    fields, has_head, image_size = CASES[request.param]
    config = transformers.ViTConfig(
        num_hidden_layers=3, intermediate_size=56, num_labels=NUM_CLASSES, **fields
    )
    kind = transformers.ViTForImageClassification if has_head else transformers.ViTModel
    model = randomized(kind(config))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type":"ViTImageProcessor"}')
    return model, folder, has_head, image_size


def torch_outputs(case, images):
    """Logits, or the class token's features, of images (B, H, W, 3)."""
    model, _, has_head, _ = case
    # The reference interpolates from square grids only.
    resized = images.shape[1:3] == CASES["another size"][2]
    out = model(pixel_values=to_torch(images), interpolate_pos_encoding=resized)
    return out.logits if has_head else out.last_hidden_state[:, 0]


def test_logits_equal_torch(case):
    _, folder, _, image_size = case
    images = random_images(image_size)
    model, variables, _ = pretrained.load(folder, image_size=image_size)
    with torch.no_grad():
        expected = torch_outputs(case, images).numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(apply(model, variables, images), expected, rtol=0, atol=1e-4)


def test_gradients_through_a_random_head_equal_torch(case):
    torch_model, folder, _, image_size = case
    model, variables, _ = pretrained.load(folder, image_size=image_size)
    check_gradients(
        model,
        variables,
        random_images(image_size),
        torch_model=torch_model,
        torch_outputs=functools.partial(torch_outputs, case),
        folder=folder,
    )


def test_loading_and_saving_is_the_identity_on_every_tensor(case, tmp_path):
    _, folder, _, _ = case
    pretrained.save(tmp_path / "out", *pretrained.load(folder))
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert after.keys() == {name for name in before if "pooler" not in name}
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [None, np.float16], ids=["float32", "float16"])
def test_what_we_save_loads_unchanged_in_transformers(tmp_path, dtype):
    config = ViTConfig(
        image_size=(16, 24), patch_size=(8, 8), width=24, depth=2, num_heads=2, mlp_dim=32,
        num_classes=3, activation="quick_gelu",
    )  # fmt: skip
    model = pretrained.make_model(config)
    images = random_images((16, 24))
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)
    params = variables["params"]
    params["classifier"]["kernel"] = jax.random.normal(jax.random.key(1), (24, 3))
    processor = pretrained.Processor(size=(16, 24), id2label={0: "ant", 1: "bee", 2: "cat"})
    pretrained.save(tmp_path / "out", model, variables, processor, dtype=dtype)

    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    assert theirs.config.id2label == processor.id2label
    assert theirs.config.label2id == {"ant": 0, "bee": 1, "cat": 2}
    with torch.no_grad():
        logits = torch_outputs((theirs, None, True, None), images).numpy()
    tolerance = 1e-4 if dtype is None else 1e-2
    np.testing.assert_allclose(apply(model, variables, images), logits, rtol=0, atol=tolerance)
    ours = pretrained.load(tmp_path / "out")
    assert ours[0].config == config
    np.testing.assert_allclose(apply(*ours[:2], images), logits, rtol=0, atol=1e-4)


# The config


def read(**fields):
    return VIT.read_config(JsonFields(fields, path="config.json"), 4, None)


def test_absent_fields_mean_what_they_mean_in_transformers():
    theirs = transformers.ViTConfig()
    config = read()
    assert config.image_size == (theirs.image_size,) * 2
    assert config.patch_size == (theirs.patch_size,) * 2
    assert config.width == theirs.hidden_size
    assert config.depth == theirs.num_hidden_layers
    assert config.num_heads == theirs.num_attention_heads
    assert config.mlp_dim == theirs.intermediate_size
    assert config.activation == theirs.hidden_act
    assert config.epsilon == theirs.layer_norm_eps
    assert config.qkv_bias == theirs.qkv_bias


def test_config_to_json_is_read_back():
    config = ViTConfig(
        image_size=(32, 48), patch_size=(16, 8), width=20, depth=1, num_heads=5, mlp_dim=7,
        num_classes=4, activation="gelu_tanh", epsilon=1e-5, qkv_bias=False,
    )  # fmt: skip
    assert read(**config_to_json(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 1}, "num_channels=1 is not supported; it must be 3"),
        ({"hidden_act": "mish"}, 'hidden_act="mish" is not supported; it must be one of gelu,'),
        ({"hidden_size": 10**9}, "hidden_size=1000000000 is not supported; it must be an integer"),
        ({"num_hidden_layers": "12"}, 'num_hidden_layers="12" is not supported'),
        ({"image_size": [1, 2, 3]}, r"image_size=\[1, 2, 3\] is not supported; .* \[height, width"),
        ({"image_size": 15}, r"image_size=\(15, 15\) is below a patch, \(16, 16\)"),
    ],
)
def test_unsupported_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        read(**fields)


def test_networks_beyond_the_format_are_not_written():
    config = ViTConfig(
        image_size=(8, 8), patch_size=(4, 4), width=8, depth=1, num_heads=1, mlp_dim=8,
        num_classes=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="'vit' format cannot describe this network.*pool='mean'"):
        config_to_json(dataclasses.replace(config, pool="mean"))


def test_every_parameter_has_a_key():
    config = ViTConfig(
        image_size=(8, 8), patch_size=(4, 4), width=8, depth=2, num_heads=1, mlp_dim=8,
        num_classes=2,
    )  # fmt: skip
    for changed in (config, dataclasses.replace(config, num_classes=0, qkv_bias=False)):
        model = pretrained.make_model(changed)
        params = jax.eval_shape(
            functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )["params"]
        names = {key.ours for key in VIT.key_table(changed, "")}
        assert names == flatten_dict(params, sep="/").keys()
