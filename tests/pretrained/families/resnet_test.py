"""The `resnet` family against its reference, `transformers` in torch."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from tests.torch_reference import apply
from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.models.resnet import MOMENTUM, ResNetConfig
from vitcls.pretrained import keys
from vitcls.pretrained.families.resnet import RESNET
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.saving import config_to_json
from vitcls.step import train_step as steps

# name -> (fields of transformers' config, with a head, image size): the published networks' layers
# with fewer channels.
CASES = {
    "resnet18": (
        dict(layer_type="basic", depths=[2, 2, 2, 2], embedding_size=16,
             hidden_sizes=[16, 24, 32, 40]),
        True,
        (64, 48),
    ),
    "resnet50": (
        dict(layer_type="bottleneck", depths=[3, 4, 6, 3], embedding_size=16,
             hidden_sizes=[32, 48, 64, 96]),
        True,
        (64, 64),
    ),
    "bottlenecks": (
        dict(layer_type="bottleneck", depths=[2, 1, 1], embedding_size=16,
             hidden_sizes=[32, 48, 64]),
        True,
        (64, 64),
    ),
    "downsample in bottleneck": (
        dict(layer_type="bottleneck", depths=[2, 1, 2], embedding_size=12,
             hidden_sizes=[24, 32, 40], hidden_act="gelu", downsample_in_bottleneck=True,
             downsample_in_first_stage=True),
        False,
        (67, 90),  # odd sides show where padding goes
    ),
}  # fmt: skip
# As in the checkpoints of microsoft/resnet-*.
PREPROCESSOR = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}
NUM_CLASSES, BATCH = 7, 8


# Compiling 53 layers forwards and backwards takes a minute; the other cases have what they have.
SLOW = {"resnet50": pytest.mark.slow}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=SLOW.get(name, ())) for name in CASES],
    ids=[name.replace(" ", "_") for name in CASES],
)
def case(request, tmp_path_factory):
    """(torch model, folder that `save_pretrained` wrote, with a head, image size)."""
    fields, has_head, image_size = CASES[request.param]
    config = transformers.ResNetConfig(num_labels=NUM_CLASSES, **fields)
    kind = transformers.ResNetForImageClassification if has_head else transformers.ResNetModel
    torch.manual_seed(0)
    model = randomize(kind(config), image_size)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return model.eval(), folder, has_head, image_size


@torch.no_grad()
def randomize(model, image_size):
    """Random scales, biases and running statistics, these near what the activations have."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.3, 1.0)
        norm.bias.normal_(0, 0.2)
        norm.momentum = 1.0  # the statistics of this batch
    model.train()(torch.randn(BATCH, 3, *image_size))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean.add_(0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.5, 1.5))
    return model


def random_images(image_size):
    return np.random.default_rng(0).normal(size=(BATCH, *image_size, 3)).astype(np.float32)


def torch_outputs(model, images, has_head):
    """Logits, or the pooled features, of images (B, H, W, 3)."""
    dtype = next(model.parameters()).dtype
    out = model(pixel_values=torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(dtype))
    return out.logits if has_head else out.pooler_output[:, :, 0, 0]


def test_logits_equal_torch(case):
    torch_model, folder, has_head, image_size = case
    images = random_images(image_size)
    model, variables, _ = pretrained.load(folder, image_size=image_size)
    with torch.no_grad():
        expected = torch_outputs(torch_model.eval(), images, has_head).numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(apply(model, variables, images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("train_batch_norm", [True, False], ids=["train", "frozen"])
def test_gradients_through_a_random_head_equal_torch(case, train_batch_norm):
    """In float64, to 1e-6: in float32 the sign of a ReLU's input within rounding of zero differs
    now and then, and one such unit of these small networks is worth 7e-3 of a gradient.
    """
    torch_model, folder, has_head, image_size = case
    images = random_images(image_size).astype(np.float64)
    loaded, variables, _ = pretrained.load(folder, image_size=image_size)
    model = pretrained.make_model(
        loaded.config, dtype=jnp.float64, train_batch_norm=train_batch_norm
    )
    num_outputs = NUM_CLASSES if has_head else loaded.config.hidden_sizes[-1]
    head = np.random.default_rng(1).normal(size=(num_outputs, 5))
    labels = np.arange(BATCH) % 5

    def loss(params, batch_stats):
        outputs, _ = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return -jax.nn.log_softmax(outputs @ head)[jnp.arange(BATCH), labels].mean()

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        grads = jax.device_get(jax.jit(jax.grad(loss))(exact["params"], exact["batch_stats"]))

    # A copy: in training its forward pass moves the running statistics.
    reference = type(torch_model)(torch_model.config)
    reference.load_state_dict(torch_model.state_dict())
    reference = reference.double().train(train_batch_norm)
    logits = torch_outputs(reference, images, has_head) @ torch.from_numpy(head)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    expected = {name: param.grad.numpy() for name, param in reference.named_parameters()}
    table = [
        key
        for key in RESNET.key_table(model.config, RESNET.written_prefix(model.config))
        if key.collection == "params"
    ]
    found = keys.dump({"params": grads}, table)
    assert found.keys() == expected.keys()
    scale = np.sqrt(sum(np.square(grad).sum() for grad in expected.values()))
    for name, grad in expected.items():
        largest = max(np.linalg.norm(grad), 1e-3 * scale)
        assert np.linalg.norm(found[name] - grad) < 1e-6 * largest, name


def batch_moments(torch_model, images, has_head):
    """float64 mean and biased variance of what enters each BatchNorm, and n, by its name."""
    reference = type(torch_model)(torch_model.config)
    reference.load_state_dict(torch_model.state_dict())
    reference = reference.double().train()
    moments, hooks = {}, []
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):

            def record(module, inputs, _, name=name):
                x = np.moveaxis(inputs[0].detach().numpy(), 1, -1)
                x = x.reshape(-1, x.shape[-1])
                moments[name] = x.mean(axis=0), x.var(axis=0), len(x)

            hooks.append(module.register_forward_hook(record))
    with torch.no_grad():
        torch_outputs(reference, images, has_head)
    return moments, reference.state_dict()


def test_running_statistics_after_one_step_equal_a_float64_reference(case):
    """The variance is biased; torch's is n / (n - 1) times that, the only difference."""
    torch_model, folder, has_head, image_size = case
    images = random_images(image_size)
    model, variables, _ = pretrained.load(folder, image_size=image_size)
    moments, torch_after = batch_moments(torch_model, images, has_head)
    tx = optax.sgd(1e-3)
    step = steps.make_train_step(
        lambda keys, batch: (batch["image"], batch["targets"], batch["mask"]),
        steps.make_loss_fn(model.apply),
        tx,
        key=jax.random.key(0),
        schedule=optax.constant_schedule(1e-3),
        ema_decay=0.0,
    )
    num_outputs = apply(model, variables, images).shape[-1]
    batch = {
        "image": images,
        "targets": np.eye(num_outputs, dtype=np.float32)[np.arange(BATCH) % num_outputs],
        "mask": np.ones(BATCH, np.float32),
    }
    state = steps.init_state(variables, tx, use_ema=False)
    with jax.default_matmul_precision("highest"):
        state, _ = jax.jit(step)(state, batch)
    table = [
        key
        for key in RESNET.key_table(model.config, RESNET.written_prefix(model.config))
        if key.collection == "batch_stats"
    ]
    found = keys.dump({"batch_stats": jax.device_get(state.batch_stats)}, table)
    before = torch_model.state_dict()
    assert len(found) == 2 * len(moments)
    for name, (mean, variance, count) in moments.items():
        old_mean = before[f"{name}.running_mean"].double().numpy()
        old_variance = before[f"{name}.running_var"].double().numpy()
        new_mean = MOMENTUM * old_mean + (1 - MOMENTUM) * mean
        new_variance = MOMENTUM * old_variance + (1 - MOMENTUM) * variance
        kwargs = dict(rtol=1e-5, atol=1e-5 * np.sqrt(old_variance).max(), err_msg=name)
        np.testing.assert_allclose(found[f"{name}.running_mean"], new_mean, **kwargs)
        kwargs["atol"] = 1e-5 * old_variance.max()
        np.testing.assert_allclose(found[f"{name}.running_var"], new_variance, **kwargs)
        unbiased = MOMENTUM * old_variance + (1 - MOMENTUM) * variance * count / (count - 1)
        np.testing.assert_allclose(torch_after[f"{name}.running_var"].numpy(), unbiased, rtol=1e-6)


def test_loading_and_saving_is_the_identity_on_every_tensor(case, tmp_path):
    _, folder, _, _ = case
    pretrained.save(tmp_path / "out", *pretrained.load(folder))
    with (
        safe_open(folder / "model.safetensors", framework="numpy") as before,
        safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as after,
    ):
        names = set(before.keys())
        counts = {name for name in names if name.endswith("num_batches_tracked")}
        assert len(counts) > 5
        assert set(after.keys()) == names
        for name in counts:
            assert after.get_tensor(name) == 0
            assert after.get_tensor(name).dtype == before.get_tensor(name).dtype
        for name in names - counts:
            np.testing.assert_array_equal(before.get_tensor(name), after.get_tensor(name))
    again = pretrained.load(tmp_path / "out")
    once = pretrained.load(folder)
    assert (again[0].config, again[2]) == (once[0].config, once[2])
    jax.tree.map(np.testing.assert_array_equal, again[1], once[1])


TINY = ResNetConfig(
    image_size=(32, 48),
    embedding_size=4,
    hidden_sizes=(8, 12),
    depths=(1, 2),
    layer_type="bottleneck",
    num_classes=3,
    activation="silu",
    downsample_in_bottleneck=True,
)


def test_what_we_save_loads_unchanged_in_transformers(tmp_path):
    model = pretrained.make_model(TINY)
    shape = (BATCH, *TINY.image_size, 3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(-0.5, 0.5, leaf.shape).astype(np.float32), shapes
    )
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    processor = pretrained.Processor(
        size=TINY.image_size, resize=40, id2label={0: "ant", 1: "bee", 2: "cat"}
    )
    pretrained.save(tmp_path / "out", model, variables, processor)
    theirs, report = transformers.ResNetForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert theirs.config.id2label == processor.id2label
    images = random_images(TINY.image_size)
    with torch.no_grad():
        logits = torch_outputs(theirs.eval(), images, True).numpy()
    np.testing.assert_allclose(apply(model, variables, images), logits, rtol=0, atol=1e-4)
    loaded = pretrained.load(tmp_path / "out")
    assert loaded[0].config == TINY
    assert loaded[2] == processor


def test_another_size_and_head_leave_the_rest(case):
    _, folder, _, _ = case
    _, kept, _ = pretrained.load(folder)
    model, variables, processor = pretrained.load(folder, num_classes=2, image_size=(96, 128))
    assert model.config.image_size == processor.size == (96, 128)
    assert not variables["params"].pop("classifier")["kernel"].any()
    kept["params"].pop("classifier", None)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)


def test_the_image_size_is_that_of_the_preprocessing(case):
    _, folder, _, _ = case
    model, _, processor = pretrained.load(folder)
    assert model.config.image_size == processor.size == (224, 224)
    assert processor.resize == 256


def test_tensors_of_other_layers_are_one_error(case, tmp_path):
    _, folder, has_head, _ = case
    if not has_head:
        return
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    content["depths"][-1] += 1
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"1[05] missing: resnet.encoder.stages.[23].layers.[123]"):
        pretrained.load(tmp_path)


# The config


def read(**fields):
    return RESNET.read_config(JsonFields(fields, path="config.json"), 4, None)


def test_absent_fields_mean_what_they_mean_in_transformers():
    theirs = transformers.ResNetConfig()
    config = read()
    assert config.embedding_size == theirs.embedding_size
    assert config.hidden_sizes == tuple(theirs.hidden_sizes)
    assert config.depths == tuple(theirs.depths)
    assert config.layer_type == theirs.layer_type
    assert config.activation == theirs.hidden_act
    assert config.downsample_in_first_stage == theirs.downsample_in_first_stage
    assert config.downsample_in_bottleneck == theirs.downsample_in_bottleneck


def test_config_to_json_is_read_back():
    config = dataclasses.replace(
        TINY, num_classes=4, image_size=(224, 224), downsample_in_first_stage=True
    )
    assert read(**config_to_json(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 1}, "num_channels=1 is not supported; it must be 3"),
        ({"hidden_act": "mish"}, 'hidden_act="mish" is not supported; it must be one of gelu,'),
        ({"layer_type": "wide"}, 'layer_type="wide" .* one of basic, bottleneck'),
        ({"depths": 3}, "depths=3 is not supported; it must be a list of 1 to 16 integers"),
        ({"depths": [3, 0, 1, 1]}, r"depths=\[3, 0, 1, 1\] .* an integer from 1 to 256"),
        ({"depths": [3]}, r"depths=\(3,\) must name the same stages"),
        ({"hidden_sizes": [10**9] * 4}, "hidden_sizes=.* an integer from 1 to 65536"),
        ({"downsample_in_bottleneck": 1}, "downsample_in_bottleneck=1 .* true or false"),
    ],
)
def test_unsupported_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        read(**fields)


def test_every_variable_has_a_key():
    for changes in (
        {},
        {"num_classes": 0, "downsample_in_first_stage": True},
        {"layer_type": "basic", "hidden_sizes": (4, 4)},
    ):
        model = pretrained.make_model(dataclasses.replace(TINY, **changes))
        variables = jax.eval_shape(
            functools.partial(model.init, train=False),
            jax.random.key(0),
            jnp.zeros((1, *TINY.image_size, 3)),
        )
        names = {
            key.path for key in RESNET.key_table(model.config, RESNET.written_prefix(model.config))
        }
        assert names == flatten_dict(variables, sep="/").keys()
