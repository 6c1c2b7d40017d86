import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vitcls.errors import UserError
from vitcls.pretrained.files import formats

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.linspace(-2, 2, 5).astype(np.float16),
    "c": np.linspace(-2, 2, 4).astype(ml_dtypes.bfloat16),
}


def write_sharded(folder):
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / formats.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_single(folder):
    formats.write(folder / formats.SINGLE, TENSORS)


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_every_float_type_is_read_as_float32(tmp_path, write):
    write(tmp_path)
    weights = formats.Weights(tmp_path)
    assert weights.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert weights.shape(name) == tensor.shape
        found = weights.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.astype(np.float32))


def test_integers_are_no_weights(tmp_path):
    formats.write(tmp_path / formats.SINGLE, {"ids": np.arange(3)})
    with pytest.raises(UserError, match="Tensor 'ids' has type I64; weights are F64, F32"):
        formats.Weights(tmp_path).read("ids")


def test_a_truncated_file_is_named(tmp_path):
    write_single(tmp_path)
    path = tmp_path / formats.SINGLE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or missing .*; get it agai"):
        formats.Weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors is damaged or missing"):
        formats.Weights(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / formats.INDEX).write_text(content)
    with pytest.raises(UserError, match="index.json is missing or not an index of weight files"):
        formats.Weights(tmp_path)


def test_an_index_cannot_leave_its_folder(tmp_path):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / formats.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names a file outside its folder: '../secret.safetensors"):
        formats.Weights(tmp_path)
