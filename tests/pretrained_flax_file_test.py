"""Flax's weight files, against what transformers 4.57 wrote and computed: see golden/."""

import shutil
import tracemalloc
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
from vitcls.pretrained import formats
from vitcls.pretrained.flax_file import FlaxFile

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("flax_vit", "flax_vit_without_head", "flax_resnet", "flax_resnet_without_head")


def read_tree(name):
    return msgpack_restore((GOLDEN / name / formats.FLAX).read_bytes())


def write(path, tree):
    """Writes a file as flax does."""
    path.write_bytes(msgpack_serialize(tree))
    return path


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


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_every_float_type_is_read_as_float32(folder, dtype):
    tree = jax.tree.map(lambda leaf: leaf.astype(dtype), read_tree("flax_vit"))
    write(folder / formats.FLAX, tree)
    _, found, _ = pretrained.load(folder)
    _, exact, _ = pretrained.load(GOLDEN / "flax_vit")
    for leaf, kept in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, kept.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("name", ["flax_vit", "flax_resnet"])
def test_arrays_in_pieces_are_put_together(tmp_path, monkeypatch, name):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)  # instead of 1 GB
    path = write(tmp_path / formats.FLAX, read_tree(name))
    assert path.read_bytes().count(b"__msgpack_chunked_array__") > 10
    found, whole = FlaxFile(path), FlaxFile(GOLDEN / name / formats.FLAX)
    assert found.names() == whole.names()
    for tensor in found.names():
        assert found.shape(tensor) == found.read(tensor).shape == whole.shape(tensor)
        np.testing.assert_array_equal(found.read(tensor), whole.read(tensor))


def test_pieces_of_several_types_are_read_each_as_its_own(tmp_path):
    chunks = {
        "0": np.full(3, 2.0),
        "1": np.full(1, 3, jnp.bfloat16),
        "2": np.full(2, 4, np.float16),
    }
    tree = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": chunks}
    path = tmp_path / formats.FLAX
    path.write_bytes(b"\x81\xa1a" + msgpack_serialize(tree, in_place=True))
    np.testing.assert_array_equal(FlaxFile(path).read("a"), [[2, 2, 2], [3, 4, 4]])


def test_missing_and_left_over_tensors_are_named(folder):
    tree = read_tree("flax_vit")
    layer = tree["vit"]["encoder"]["layer"]["1"]
    layer["rotary"] = {"kernel": np.zeros((2, 3), np.float32)}
    del layer["output"]["dense"]["kernel"]
    write(folder / formats.FLAX, tree)
    with pytest.raises(
        UserError,
        match=r"1 missing: vit.encoder.layer.1.output.dense.weight\n"
        r"  1 not known to this network: vit.encoder.layer.1.rotary.weight$",
    ):
        pretrained.load(folder)


def test_a_kernel_of_another_shape_is_named_as_torch_has_it(folder):
    tree = read_tree("flax_vit")
    tree["classifier"]["kernel"] = np.zeros((16, 4), np.float32)
    write(folder / formats.FLAX, tree)
    with pytest.raises(UserError, match=r"classifier.weight is \(4, 16\), not \(5, 16\)"):
        pretrained.load(folder)


def test_a_file_that_is_too_large_is_refused_unread(folder):
    count = 1 << 29
    shape, dtype = msgpack.packb((count,)), msgpack.packb("float32")
    head = b"\x93" + shape + dtype + b"\xc6" + (4 * count).to_bytes(4)
    with (folder / formats.FLAX).open("wb") as file:
        file.write(b"\x81\xa3big\xc9" + (len(head) + 4 * count).to_bytes(4) + b"\x01" + head)
        file.truncate(file.tell() + 4 * count)  # a hole of 2 GB
    tracemalloc.start()
    with pytest.raises(UserError, match=r"1 not known to this network: big"):
        pretrained.load(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 26


def test_a_truncated_file_is_named(folder):
    path = folder / formats.FLAX
    content = path.read_bytes()
    for size in range(0, len(content), 397):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"flax_model.msgpack is damaged, .*; get it again"):
            pretrained.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot mmap an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"item 1 at byte 0"),
        (msgpack_serialize(np.zeros(3)), r"item 1 at byte 0"),
        (msgpack_serialize({"a": [np.zeros(3)]}), r"item 3 at byte 3"),
        (msgpack_serialize({"a": 3}), r"item 3 at byte 3"),
        (msgpack_serialize({"a": 3j}), "something other than arrays"),
        (msgpack_serialize({"a": np.float32(3)}), "something other than arrays"),
        (msgpack_serialize({"a": np.arange(3)}), "an array of type 'int64'; weights are float64, "),
        (msgpack_serialize({"a": np.zeros(3)}) + b"\x00", "bytes after the last tensor"),
        (
            msgpack_serialize({"a": {"kernel": np.zeros(3), "scale": np.ones(3)}}),
            "two tensors 'a.weight'",
        ),
        (
            msgpack_serialize({"a": np.zeros(3)}).replace(b"\x91\x03", b"\x91\x04"),
            r"an array \(4,\) of float64 in 24 bytes",
        ),
        (b"\x81\xa1a" * 40 + b"\x80", "maps more than 32 deep"),
        (b"\x83" + (b"\xa1a\xde\xff\xff" + b"\xa1b\x80" * 65535) * 3, "item 262145 at byte"),
        (b"\xdf\xff\xff\xff\xff", "item 1 at byte 0"),
    ],
)  # fmt: skip
def test_what_flax_does_not_write_is_refused(tmp_path, content, message):
    (tmp_path / formats.FLAX).write_bytes(content)
    with pytest.raises(UserError, match=f"damaged, or not what flax writes .*{message}"):
        formats.Weights(tmp_path)


def test_pieces_must_fit_their_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    content = msgpack_serialize({"a": np.zeros((5, 10), np.float32)})
    (tmp_path / formats.FLAX).write_bytes(
        content.replace(b"\xa10\x05\xa11\x0a", b"\xa10\x06\xa11\x0a")
    )
    with pytest.raises(UserError, match="an array in pieces that do not fit its shape"):
        formats.Weights(tmp_path)


def test_flipped_bits_raise_nothing_else(tmp_path):
    """A flip among the values goes unseen, as in every format without a checksum."""
    tree = {f"m{i}": {"kernel": np.ones((1, 2), np.float32)} for i in range(20)}
    content = msgpack_serialize(tree)  # lengths and names, most of it
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        (tmp_path / formats.FLAX).write_bytes(damaged)
        try:
            weights = formats.Weights(tmp_path)
            for name in weights.names():
                assert weights.read(name).shape == weights.shape(name)
        except UserError:
            refused += 1
    assert 160 < refused < 360


def test_safetensors_come_first(folder):
    model, variables, processor = pretrained.load(folder)
    pretrained.save(folder.parent / "saved", model, variables, processor)
    (folder.parent / "saved" / formats.SINGLE).rename(folder / formats.SINGLE)
    (folder / formats.FLAX).write_bytes(b"not read")
    assert formats.FLAX not in pretrained.find(folder).sha256()
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder)[1], variables)
