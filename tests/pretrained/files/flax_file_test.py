"""Flax's weight files, against what transformers 4.57 wrote and computed: see golden/."""

import json
import os
import shutil
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize

from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.pretrained.files import formats
from vitcls.pretrained.files.flax_file import FlaxWeights

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = tuple(sorted(folder.name for folder in GOLDEN.glob("flax_*")))


def read_tree(name):
    return msgpack_restore((GOLDEN / name / formats.FLAX).read_bytes())


@pytest.fixture
def folder(tmp_path):
    """A copy of the ViT with a head, to be changed."""
    return Path(shutil.copytree(GOLDEN / "flax_vit", tmp_path / "model"))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_those_of_the_flax_classes(name):
    reference = np.load(GOLDEN / name / "reference.npz")
    model, variables, processor = pretrained.load(GOLDEN / name)
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(model.apply, static_argnames="train")(
            variables, reference["images"], train=False
        )
    assert processor.size == reference["images"].shape[1:3]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert np.abs(reference["outputs"]).max() > 1
    np.testing.assert_allclose(outputs, reference["outputs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_another_head_leaves_the_rest(name):
    _, kept, _ = pretrained.load(GOLDEN / name)
    _, variables, _ = pretrained.load(GOLDEN / name, num_classes=2)
    head = variables["params"].pop("classifier")
    assert head["kernel"].shape[1] == 2 and not head["kernel"].any()
    kept["params"].pop("classifier", None)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_every_float_type_is_read_as_float32(folder, dtype):
    tree = jax.tree.map(lambda leaf: leaf.astype(dtype), read_tree("flax_vit"))
    (folder / formats.FLAX).write_bytes(msgpack_serialize(tree))
    _, found, _ = pretrained.load(folder)
    _, exact, _ = pretrained.load(GOLDEN / "flax_vit")
    for leaf, kept in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, kept.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("name", ["flax_vit", "flax_resnet"])
def test_arrays_in_pieces_are_put_together(tmp_path, monkeypatch, name):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)  # instead of 1 GB
    path = tmp_path / formats.FLAX
    path.write_bytes(msgpack_serialize(read_tree(name)))
    assert path.read_bytes().count(b"__msgpack_chunked_array__") > 10
    found, whole = FlaxWeights(path), FlaxWeights(GOLDEN / name / formats.FLAX)
    assert found.names() == whole.names()
    for tensor in found.names():
        assert found.shape(tensor) == found.read(tensor).shape == whole.shape(tensor)
        np.testing.assert_array_equal(found.read(tensor), whole.read(tensor))


def test_tensors_that_do_not_fit_are_named_as_torch_has_them(folder):
    tree = read_tree("flax_vit")
    tree["classifier"]["kernel"] = np.zeros((16, 4), np.float32)
    layer = tree["vit"]["encoder"]["layer"]["1"]
    layer["rotary"] = {"kernel": np.zeros((2, 3), np.float32)}
    del layer["output"]["dense"]["kernel"]
    (folder / formats.FLAX).write_bytes(msgpack_serialize(tree))
    with pytest.raises(
        UserError,
        match=r"1 missing: vit.encoder.layer.1.output.dense.weight\n"
        r"  1 not known to this network: vit.encoder.layer.1.rotary.weight\n"
        r"  1 of another shape: classifier.weight is \(4, 16\), not \(5, 16\)$",
    ):
        pretrained.load(folder)


@pytest.mark.parametrize("name", ["flax_vit_without_head", "flax_resnet"])
def test_a_file_larger_than_its_network_is_refused_unread(tmp_path, monkeypatch, name):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    variables = pretrained.load(folder, num_classes=5)[1]
    most = 8 * sum(leaf.size for leaf in jax.tree.leaves(variables)) + (1 << 20)
    path = folder / formats.FLAX
    os.truncate(path, most)  # longer than it was: what follows the tensors is a hole
    with pytest.raises(UserError, match=r"received extra data"):
        pretrained.load(folder)
    os.truncate(path, most + 1)
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(
        UserError, match=rf"model.msgpack has {most + 1} bytes, .* needs {most} at most; get"
    ):
        pretrained.load(folder)


def test_a_text_tower_may_be_larger_than_the_vision_tower(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "flax_clip_with_text", tmp_path / "model"))
    tree = read_tree("flax_clip_with_text")
    tree["text_model"]["embeddings"]["token_embedding"]["embedding"] = np.zeros((49408, 8), "f4")
    (folder / formats.FLAX).write_bytes(msgpack_serialize(tree))
    found, expected = pretrained.load(folder)[1], pretrained.load(GOLDEN / "flax_clip_with_text")[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_scaled_layer_scale_is_refused(tmp_path):
    """Its Flax class and torch's mean other things by the same tensors."""
    folder = Path(shutil.copytree(GOLDEN / "flax_dinov2", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layerscale_value": 0.5}))
    with pytest.raises(UserError, match="layerscale_value=0.5 is not .* 1 next to a flax_model"):
        pretrained.load(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / formats.FLAX
    content = path.read_bytes()
    for size in range(0, len(content), 997):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"flax_model.msgpack is damaged, .*; get it again"):
            FlaxWeights(path)


ONE = np.ones(1, np.float32)


def extension(content, code=1):
    return b"\x81\xa1a" + msgpack.packb(msgpack.ExtType(code, content))


def in_pieces(shape, chunks):
    """A flag, then the shape and the chunks as maps, as flax has them."""
    return msgpack_serialize(
        {"a": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}}
    )


LISTS = b"\x90"  # 8 lists in each of 8 lists, and so on
for _ in range(4):
    LISTS = b"\x98" + 8 * LISTS
MAPS = msgpack.packb({str(i): {str(j): {} for j in range(250)} for i in range(250)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "incomplete input"),
        (b"version https://git-lfs.github.com/spec/v1\n", "extra data"),
        (msgpack_serialize(ONE), "expected .*dict"),
        (msgpack_serialize({"a": [ONE]}), "1 exceeds max_array_len"),
        (msgpack_serialize({"a": 3}), "something other than arrays"),
        (msgpack_serialize({"a": "b"}), "something other than arrays"),
        (msgpack_serialize({1: ONE}), "is not allowed for map key"),
        (msgpack_serialize({"a" * 33: ONE}), "exceeds max_str_len"),
        (msgpack_serialize({"a": 3j}), "expected 3, got 2"),
        (msgpack_serialize({"a": ONE[0]}), "'float32' in extension 3; weights are float32, "),
        (msgpack_serialize({"a": np.arange(3)}), "'int64' in extension 1; weights are float32, "),
        (msgpack_serialize({"a": ONE}) + b"\x00", "extra data"),
        (msgpack_serialize({"a": {"bias": ONE}, "params": {"a": {"bias": ONE}}}), "two arrays of"),
        (msgpack_serialize({"a": ONE}).replace(b"\x91\x01", b"\x91\x02"), "into shape .2,"),
        (extension(msgpack.packb(([1] * 9, "float32", bytes(4)))), "9 exceeds max_array_len"),
        (in_pieces({"0": 1 << 40}, {"0": ONE}), "into shape .1099511627776,"),
        (in_pieces({"0": 1}, {"0": 3}), "zero-dimensional"),
        # Lengths beyond the file's, and small files of very many objects.
        (b"\xdd\xff\xff\xff\xff" * 99, "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff" * 99, "exceeds max_map_len"),
        (msgpack_serialize({str(i): ONE for i in range(257)}), "257 exceeds max_map_len"),
        (b"\x81\xdb\xff\xff\xff\xff", "(incomplete input|exceeds max_str_len)"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "exceeds max_ext_len"),
        (extension(b"\xdd\xff\xff\xff\xff" * 99), "exceeds max_array_len"),
        (extension(b"\x93" + 3 * LISTS), "too many entries"),
        (b"\x81\xa1a" * 32 + msgpack_serialize({"a": ONE}), "deeper than 32 maps"),
        (b"\x81\xa1a" * 2000, ""),
        (MAPS, "too many entries"),
    ],
)  # fmt: skip
def test_what_flax_does_not_write_is_refused(tmp_path, content, message):
    path = tmp_path / formats.FLAX
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged, or not what flax writes .*{message}.*; get it"):
        FlaxWeights(path)


def test_safetensors_come_first(folder):
    model, variables, processor = pretrained.load(folder)
    pretrained.save(folder.parent / "saved", model, variables, processor)
    (folder.parent / "saved" / formats.SINGLE).rename(folder / formats.SINGLE)
    (folder / formats.FLAX).write_bytes(b"not read")
    assert formats.FLAX not in pretrained.find(folder).sha256()
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder)[1], variables)
