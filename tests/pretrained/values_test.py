"""Weights that no network can have are refused by name, in every format, on reading and saving."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from vitcls import pretrained
from vitcls.checkpoints.manager import Checkpoints
from vitcls.errors import UserError
from vitcls.models.resnet import ResNetConfig
from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained import keys
from vitcls.pretrained.files import formats
from vitcls.pretrained.reading import FAMILIES

VIT = ViTConfig(
    image_size=(8, 8), patch_size=(4, 4), width=8, depth=1, num_heads=2, mlp_dim=8, num_classes=2
)
RESNET = ResNetConfig(
    family="resnet", image_size=(32, 32), embedding_size=4, hidden_sizes=(8,), depths=(1,),
    layer_type="basic", num_classes=2,
)  # fmt: skip


def network(config) -> tuple:
    """A network, its variables as numpy arrays and a processor."""
    model = pretrained.make_model(config)
    images = jnp.zeros((1, *config.image_size, 3))
    variables = jax.device_get(model.init(jax.random.key(0), images, train=False))
    processor = pretrained.Processor(size=config.image_size, id2label={0: "ant", 1: "bee"})
    return model, variables, processor


def dump(config) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by the names that `transformers` gives them."""
    family = FAMILIES[config.family]
    return keys.dump(network(config)[1], family.key_table(config, family.prefix))


def write_config(folder: Path, config) -> None:
    model, _, processor = network(config)
    pretrained.write_config(folder, model.config, processor)


def in_one_file(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / formats.SINGLE)


def in_shards(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    place = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    (folder / formats.INDEX).write_text(json.dumps({"weight_map": place}))
    for shard in set(place.values()):
        save_file({name: tensors[name] for name in place if place[name] == shard}, folder / shard)


def in_msgpack(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Kernels as flax has them; the tensors here that are not kernels are vectors or alike."""
    tree = {}
    for name, tensor in tensors.items():
        modules, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.ndim > 1:
            leaf, tensor = "kernel", np.moveaxis(tensor, (0, 1), (-1, -2))
        tree[(*modules.split("."), "scale" if leaf == "weight" else leaf)] = tensor
    (folder / formats.FLAX).write_bytes(msgpack_serialize(unflatten_dict(tree)))


def in_a_pickle(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    found = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    torch.save(found, folder / "pytorch_model.bin")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("write", [in_one_file, in_shards, in_msgpack, in_a_pickle])
def test_values_that_are_not_finite_are_refused_in_every_format(tmp_path, write, value):
    tensors = dump(VIT)
    write_config(tmp_path, VIT)
    write(tmp_path, tensors)
    pretrained.load(tmp_path, allow_pickle=True)
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    tensors["classifier.weight"][1, 2:5] = value
    tensors["vit.layernorm.bias"][3] = value
    write(tmp_path, tensors)
    with pytest.raises(
        UserError,
        match=r"^'.*' has values that no network can use, in 2 tensors: "
        r"vit.layernorm.bias \(1 of 8 not finite in float32\), "
        r"classifier.weight \(3 of 16 not finite in float32\)\. Get it again, or",
    ):
        pretrained.load(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_narrow_types_that_overflowed_when_they_were_saved_are_refused(tmp_path, dtype):
    tensors = dump(VIT)
    write_config(tmp_path, VIT)
    tensors["classifier.bias"] = np.array([1.0, np.inf]).astype(dtype)
    in_one_file(tmp_path, tensors)
    with pytest.raises(UserError, match=r"classifier.bias \(1 of 2 not finite in float32\)"):
        pretrained.load(tmp_path)


@pytest.mark.filterwarnings("error")
def test_values_beyond_float32_are_refused(tmp_path):
    tensors = dump(VIT)
    write_config(tmp_path, VIT)
    tensors["classifier.bias"] = np.array([1.0, 1e300])
    in_one_file(tmp_path, tensors)
    with pytest.raises(UserError, match=r"classifier.bias \(1 of 2 not finite in float32\)"):
        pretrained.load(tmp_path)


def test_a_variance_below_zero_is_refused(tmp_path):
    tensors = dump(RESNET)
    write_config(tmp_path, RESNET)
    name = "resnet.embedder.embedder.normalization.running_var"
    tensors[name] = np.array([1, 0, -1e-3, 1], np.float32)
    in_one_file(tmp_path, tensors)
    with pytest.raises(UserError, match=rf"in 1 tensors: {name} \(a variance below 0\)\. Get"):
        pretrained.load(tmp_path)


def test_tensors_that_nothing_reads_may_hold_anything(tmp_path):
    tensors = dump(VIT)
    tensors["vit.pooler.dense.bias"] = np.full(8, np.nan, np.float32)
    write_config(tmp_path, VIT)
    in_one_file(tmp_path, tensors)
    pretrained.load(tmp_path)


def spoiled(variables: dict, name: str, value: float) -> dict:
    flat = {path: np.array(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}
    flat[name].flat[0] = value
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize(
    ("item", "name", "value", "message"),
    [
        ("params", "params/classifier/bias", np.nan, r"classifier/bias \(1 of 2 not finite in fl"),
        ("ema", "params/classifier/bias", np.inf, r"classifier/bias \(1 of 2 not finite in fl"),
        (
            "ema",
            "batch_stats/embedder/normalization/var",
            -1.0,
            r"batch_stats/embedder/normalization/var \(a variance below 0\)",
        ),
    ],
)
def test_a_runs_checkpoint_is_refused_by_what_is_read_of_it(
    tmp_path, monkeypatch, item, name, value, message
):
    monkeypatch.setattr(
        "vitcls.checkpoints.manager._all_finite", lambda tree: True
    )  # who else wrote it
    write_config(tmp_path / "model", RESNET)
    _, variables, _ = network(RESNET)
    bad = spoiled(variables, name, value)
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        items = {"params": variables, "opt_state": {"x": np.zeros(1)}}
        # Averages are what is read where there are any.
        checkpoints.save(1, items | {"params": bad, "ema": variables}, meta={}, score=None)
        checkpoints.save(2, items | {item: bad}, meta={}, score=None)
        checkpoints.wait()
    pretrained.load(f"{tmp_path}@1")
    with pytest.raises(UserError, match=rf"^{tmp_path}@2 has .*{message}.*another step of this"):
        pretrained.load(f"{tmp_path}@2")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, None, r"classifier.bias \(1 of 2 not finite in float32\)"),
        (7e4, np.float16, r"classifier.bias \(1 of 2 not finite in float16\)"),
        (3.4e38, jnp.bfloat16, r"classifier.bias \(1 of 2 not finite in bfloat16\)"),
    ],
)
def test_what_is_not_finite_is_not_saved(tmp_path, value, dtype, message):
    model, variables, processor = network(VIT)
    bad = spoiled(variables, "params/classifier/bias", value)
    with pytest.raises(UserError, match=f"What would be written .*{message}"):
        pretrained.save(tmp_path / "out", model, bad, processor, dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    pretrained.save(tmp_path / "out", model, variables, processor, dtype=dtype)
