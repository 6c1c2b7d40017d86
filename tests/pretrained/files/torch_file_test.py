"""torch's weight files, against the same weights in safetensors, and crafted ones."""

import json
import os
import pickle
import re
import sys
import types

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.pretrained.files import formats
from vitcls.pretrained.files.torch_file import TorchWeights

SINGLE, INDEX = formats.PICKLES


@pytest.fixture(scope="module")
def model():
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


@pytest.fixture
def folder(model, tmp_path):
    """What `save_pretrained` writes, all but the weights."""
    model.config.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def tensors(model, tmp_path):
    """The weights under the names that are on disk, shared by none."""
    model.save_pretrained(tmp_path / "safe")
    file = safe_open(tmp_path / "safe" / formats.SINGLE, framework="pt")
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_single(folder, tensors, **kwargs):
    torch.save(tensors, folder / SINGLE, **kwargs)


def write_old(folder, tensors):
    """As before torch 1.6: no zip file."""
    write_single(folder, tensors, _use_new_zipfile_serialization=False)


def write_sharded(folder, tensors):
    weight_map = {}
    for number in (0, 1):
        shard = dict(list(tensors.items())[number::2])
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("write", [write_single, write_old, write_sharded])
def test_variables_equal_those_of_safetensors(folder, tensors, write):
    write(folder, tensors)
    _, found, _ = pretrained.load(folder, allow_pickle=True)
    for path in folder.glob("*.bin*"):
        path.unlink()
    formats.write(folder / formats.SINGLE, {name: t.numpy() for name, t in tensors.items()})
    _, expected, _ = pretrained.load(folder)
    assert expected["params"]["classifier"]["kernel"].any()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == np.float32 and leaf.flags.writeable


def test_safetensors_come_first(folder, tensors):
    (folder / SINGLE).write_bytes(b"not read")
    formats.write(folder / formats.SINGLE, {name: t.numpy() for name, t in tensors.items()})
    files = pretrained.find(folder, allow_pickle=True)
    assert SINGLE not in files.sha256()
    pretrained.read_variables(files, pretrained.read_config(files)[0])


def test_every_float_type_is_read_as_float32(tmp_path):
    exact = torch.linspace(-2, 2, 6).reshape(2, 3)
    types_ = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    write_single(tmp_path, {str(dtype): exact.to(dtype) for dtype in types_})
    weights = TorchWeights(tmp_path / SINGLE)
    assert weights.names() == set(map(str, types_))
    for dtype in types_:
        found = weights.read(str(dtype))
        assert found.dtype == np.float32 and weights.shape(str(dtype)) == (2, 3)
        np.testing.assert_array_equal(found, exact.to(dtype).to(torch.float32).numpy())


def test_tensors_that_share_memory_are_copied(tmp_path):
    shared = torch.arange(12.0)
    parameter = torch.nn.Parameter(shared.reshape(3, 4).T)
    write_single(tmp_path, {"a": shared, "b": shared[2:5], "c": parameter})
    weights = TorchWeights(tmp_path / SINGLE)
    first = weights.read("a")
    first[:] = -1
    np.testing.assert_array_equal(weights.read("a"), np.arange(12))
    np.testing.assert_array_equal(weights.read("b"), [2, 3, 4])
    np.testing.assert_array_equal(weights.read("c"), np.arange(12).reshape(3, 4).T)


def test_integers_are_no_weights(tmp_path):
    write_single(tmp_path, {"ids": torch.arange(3)})
    with pytest.raises(UserError, match="Tensor 'ids' has type torch.int64; weights are torch.fl"):
        TorchWeights(tmp_path / SINGLE).read("ids")


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cannot_run_code(tmp_path, zipped):
    attack = {"a": torch.ones(3), "b": Attack(tmp_path / "made")}
    write_single(tmp_path, attack, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pytorch_model.bin is .* holds more than .*UnpicklingErr"):
        TorchWeights(tmp_path / SINGLE)
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / SINGLE, weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is missing, damaged, or holds more than tensors by their names"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is missing, damaged"),
        (pickle.dumps({"a": 1}, protocol=2), "is missing, damaged"),
    ],
)
def test_what_torch_does_not_write_is_refused(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match=f"pytorch_model.bin {message}.*; get it again"):
        TorchWeights(tmp_path / SINGLE)


def test_a_truncated_file_is_named(tmp_path):
    write_single(tmp_path, {"a": torch.ones(99)})
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"pytorch_model.bin is missing, damaged, .*; get it again"):
        TorchWeights(tmp_path / SINGLE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "is missing, damaged, or holds more than tensors by their names"),
        (torch.ones(3), "is missing, damaged"),
        ({"state_dict": {"a": torch.ones(3)}}, "something other than a dense tensor as 'state_di"),
        ({"a": torch.eye(3).to_sparse()}, "something other than a dense tensor as 'a'"),
        ({"a": torch.ones(3, device="meta")}, "something other than a dense tensor as 'a'"),
        ({1: torch.ones(3)}, "something other than a dense tensor as 1"),
    ],
)
def test_only_tensors_by_their_names_are_read(tmp_path, content, message):
    write_single(tmp_path, content)
    with pytest.raises(UserError, match=message):
        TorchWeights(tmp_path / SINGLE)


def test_a_missing_shard_is_named(folder, tensors):
    write_sharded(folder, tensors)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002.bin is missing, damaged"):
        TorchWeights(folder / INDEX)
    with pytest.raises(
        UserError, match=r"has no pytorch_model-00002-of-00002.bin, which pytorch_m"
    ):
        pretrained.load(folder, allow_pickle=True)


def test_an_index_cannot_leave_its_folder(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "../x.bin"}}')
    with pytest.raises(UserError, match="names a file outside its folder"):
        TorchWeights(tmp_path / INDEX)


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
def test_an_older_torch_is_refused(tmp_path, monkeypatch, version):
    write_single(tmp_path, {"a": torch.ones(3)})
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
    message = rf'2.10 or newer, this is {re.escape(version)}; install .* "torch>=2.10"'
    with pytest.raises(UserError, match=message):
        TorchWeights(tmp_path / SINGLE)


def test_no_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        UserError, match=r"there is none; install the extra vitcls\[torch\], or run"
    ):
        TorchWeights(tmp_path / SINGLE)
