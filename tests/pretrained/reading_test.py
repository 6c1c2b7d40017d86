import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.pretrained.values_test import in_a_pickle, in_msgpack, in_one_file
from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.models.resnet import resnet_config
from vitcls.models.vit_config import ViTConfig

CONFIG = ViTConfig(
    image_size=(8, 8),
    patch_size=(4, 4),
    width=8,
    depth=1,
    num_heads=2,
    mlp_dim=12,
    num_classes=3,
)
PROCESSOR = pretrained.Processor(size=(8, 8), id2label={0: "ant", 1: "bee", 2: "cat"})


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with random weights, head included."""
    model = pretrained.make_model(CONFIG)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    pretrained.save(tmp_path / "model", model, variables, PROCESSOR)
    return tmp_path / "model"


def change(folder, file="config.json", **fields):
    content = json.loads((folder / file).read_text()) | fields
    content = {name: value for name, value in content.items() if value is not None}
    (folder / file).write_text(json.dumps(content))
    return folder


def read_config(folder):
    return pretrained.read_config(pretrained.find(folder))


def test_config_and_class_names_come_from_the_files(folder):
    assert read_config(folder) == (CONFIG, PROCESSOR)


def test_load_gives_float32_logits(folder):
    model, variables, processor = pretrained.load(folder, dtype=jnp.bfloat16)
    images = [np.zeros((20, 30, 3), np.uint8)] * 2
    logits = model.apply(variables, processor(images), train=False)
    assert logits.shape == (2, 3)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_arguments_that_mean_nothing_to_a_network_are_refused():
    with pytest.raises(UserError, match="model.batch_norm='frozen': this network has no BatchNorm"):
        pretrained.make_model(CONFIG, train_batch_norm=False)
    resnet = resnet_config("resnet18", num_classes=2, image_size=(8, 8))
    with pytest.raises(UserError, match="model.dropout=0.1 and model.drop_path=0.0: a ResNet has"):
        pretrained.make_model(resnet, dropout_rate=0.1)
    with pytest.raises(UserError, match="model.patch_dropout=0.5: a ResNet has no patches"):
        pretrained.make_model(resnet, patch_dropout_rate=0.5)


def test_another_number_of_classes_gives_a_zero_head(folder):
    _, kept, _ = pretrained.load(folder)
    model, variables, processor = pretrained.load(folder, num_classes=5)
    assert model.config.num_classes == 5
    assert processor.id2label == {i: f"LABEL_{i}" for i in range(5)}
    head = variables["params"].pop("classifier")
    assert {name: leaf.shape for name, leaf in head.items()} == {"kernel": (8, 5), "bias": (5,)}
    assert not any(leaf.any() for leaf in head.values())
    kept["params"].pop("classifier")
    jax.tree.map(np.testing.assert_array_equal, variables["params"], kept["params"])


def test_a_new_head_of_the_same_width_is_zero(folder):
    files = pretrained.find(folder)
    assert pretrained.read_variables(files, CONFIG)["params"]["classifier"]["kernel"].any()
    variables = pretrained.read_variables(files, CONFIG, new_head=True)
    assert not variables["params"]["classifier"]["kernel"].any()


def test_no_classes_gives_features(folder):
    model, variables, processor = pretrained.load(folder, num_classes=0)
    assert "classifier" not in variables["params"]
    assert processor.id2label == {}
    assert model.apply(variables, jnp.zeros((1, 8, 8, 3)), train=False).shape == (1, 8)


def test_a_headless_checkpoint_gets_a_head(folder, tmp_path):
    pretrained.save(tmp_path / "bare", *pretrained.load(folder, num_classes=0))
    config, processor = read_config(tmp_path / "bare")
    assert (config.num_classes, processor.id2label) == (0, {})
    _, variables, _ = pretrained.load(tmp_path / "bare", num_classes=2)
    assert variables["params"]["classifier"]["kernel"].shape == (8, 2)


def test_another_image_size_resizes_positions_and_processor(folder):
    model, variables, processor = pretrained.load(folder, image_size=(12, 20))
    positions = variables["params"]["embeddings"]["position_embeddings"]
    assert positions.shape == (1, 1 + 3 * 5, 8)
    assert processor.size == model.config.image_size == (12, 20)


def test_the_processor_follows_the_network_size(folder):
    change(folder, "preprocessor_config.json", size={"height": 16, "width": 16})
    assert read_config(folder)[1].size == (8, 8)


def test_classes_without_names_are_numbered(folder):
    change(folder, id2label=None, num_labels=3)
    assert read_config(folder)[1].id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_class_names_are_ordered_by_index(folder):
    change(folder, id2label={"2": "cat", "0": "ant", "1": "bee"})
    assert list(read_config(folder)[1].id2label.items()) == [(0, "ant"), (1, "bee"), (2, "cat")]


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({"0": 7, "1": 8, "2": 9.5}, ["7", "8", "9.5"]),
        ({"1": "ant", "2": "bee", "3": "cat"}, ["ant", "bee", "cat"]),
        ({"3": 30, "1": 10, "2": 20}, ["10", "20", "30"]),
        ({"0": "cat", "1": "cat", "2": " cat"}, ["cat", "cat", " cat"]),  # ImageNet has two cranes
    ],
)
def test_labels_may_be_numbers_and_count_from_1(folder, caplog, id2label, names):
    change(folder, id2label=id2label)
    _, variables, processor = pretrained.load(folder)
    assert list(processor.id2label.items()) == list(enumerate(names))
    assert variables["params"]["classifier"]["kernel"].any()
    warning = (
        f"id2label counts from 1; the head's first class is {names[0]!r}, the last {names[2]!r}"
    )
    assert (warning in caplog.text) == ("0" not in id2label)


MALFORMED = [
    {"id2label": {"0": "ant", "2": "bee"}},
    {"id2label": {"0": None}},
    {"id2label": "ant, bee, cat"},
    {"id2label": {"0": "ant"}, "num_labels": 7},
    {"id2label": None, "num_labels": "three"},
    {"id2label": None, "num_labels": 1000},
]


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("fields", MALFORMED)
@pytest.mark.parametrize("form", ["safetensors", "msgpack", "pickle"])
def test_a_discarded_head_need_not_fit(folder, fields, num_classes, form):
    _, kept, _ = pretrained.load(folder, num_classes=num_classes)
    change(folder, **fields)
    with pytest.raises(UserError):
        pretrained.load(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = np.full((3, 4), np.nan, np.float32)
    tensors["classifier.1.bias"] = tensors.pop("classifier.bias")
    (folder / "model.safetensors").unlink()
    {"safetensors": in_one_file, "msgpack": in_msgpack, "pickle": in_a_pickle}[form](
        folder, tensors
    )
    model, variables, processor = pretrained.load(
        folder, num_classes=num_classes, allow_pickle=True
    )
    assert model.config.num_classes == len(processor.id2label) == num_classes
    jax.tree.map(np.testing.assert_array_equal, variables, kept)
    files = pretrained.find(folder, allow_pickle=True)
    config, processor = pretrained.read_config(files, new_head=True)
    assert (config.num_classes, processor.id2label) == (0, {})
    pretrained.read_variables(files, model.config, new_head=True)


def test_a_head_of_the_wanted_width_is_kept(folder):
    """Then its names are used, and so have to fit."""
    assert pretrained.load(folder, num_classes=3)[2].id2label == PROCESSOR.id2label
    change(folder, id2label={"0": "ant", "2": "bee"})
    with pytest.raises(UserError, match="there is none under 1"):
        pretrained.load(folder, num_classes=3)


def test_a_config_of_another_network_is_one_error(folder):
    change(folder, num_hidden_layers=2, id2label={"0": "ant", "1": "bee"})
    with pytest.raises(UserError, match=r"16 missing: vit.encoder.layer.1.*\n  2 of another shape"):
        pretrained.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "vitt"}, "Unknown model_type 'vitt'. Did you mean 'vit'"),
        ({"model_type": None}, "has no model_type: it is not a Hugging Face config"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "asks to run code that it brings"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label=.* class names under the keys 0 to 1"),
        ({"id2label": {"0": "a", "2": "b"}}, "or 1 to 2; there is none under 1"),
        ({"id2label": {"1": "a", "3": "b"}}, "or 1 to 2; there is none under 2"),
        ({"id2label": {"0": "a", "1": None}}, "there is none under 1"),
        ({"id2label": {"0": "a", "1": True}}, "there is none under 1"),
        ({"id2label": {"0": "a", "1": float("nan")}}, "there is none under 1"),
        ({"id2label": {"0": "a", "01": "b"}}, "there is none under 1"),
        ({"id2label": {}}, "id2label={} is not supported; it must be an object of class names"),
        ({"id2label": None, "num_labels": 10**12}, "num_labels=1000000000000 is not supported"),
    ],
)
def test_unsupported_configs_are_named(folder, fields, message):
    with pytest.raises(UserError, match=message):
        read_config(change(folder, **fields))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("[1]", "holds no JSON object"),
        ('{"id2label": {"0": "a", "1": "b", "1": "c"}}', "is not .*: the key '1' is there twice"),
    ],
)
def test_broken_json_is_named(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json {message}"):
        read_config(folder)


def test_heads_for_several_labels_per_image_are_warned_of(folder, caplog):
    read_config(change(folder, problem_type="multi_label_classification"))
    assert "problem_type=multi_label_classification is not supported" in caplog.text
