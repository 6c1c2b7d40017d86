"""timm's checkpoints, against what timm 1.0.31 computes: see golden/make_timm_outputs.py."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.golden.timm_weights import make_images, make_picture, make_tensor
from tests.pretrained.families.vit_test import apply
from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.pretrained import keys
from vitcls.pretrained.families.timm import TIMM
from vitcls.pretrained.files import formats
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.reading import variable_shapes

GOLDEN = Path(__file__).parents[2] / "golden" / "timm"
ARCHITECTURES = json.loads((GOLDEN / "architectures.json").read_text())
NAMES = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "resnet18"]
# What differs from them by numbers only.
LARGER = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("vit_tiny_patch16_384_without_head", "vit_small_patch32_224", "resnet50")
]


@pytest.fixture(scope="module", params=[*NAMES, *LARGER])
def case(request, tmp_path_factory):
    """(what timm computes, its tensors, the folder that it writes, what is loaded from it)."""
    reference = np.load(GOLDEN / f"{request.param}.npz")
    shapes = json.loads(str(reference["tensors"]))
    tensors = {name: make_tensor(name, tuple(shape)) for name, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("timm")
    (folder / "config.json").write_text(str(reference["config"]))
    formats.write(folder / formats.SINGLE, with_counts(tensors))
    return reference, tensors, folder, pretrained.load(folder)


def with_counts(tensors):
    """With BatchNorm's counts of batches, which timm's files have, too."""
    means = [name for name in tensors if name.endswith("running_mean")]
    counts = [name.replace("running_mean", "num_batches_tracked") for name in means]
    return tensors | dict.fromkeys(counts, np.ones((), np.int64))


def test_outputs_equal_timm(case):
    reference, _, _, (model, variables, processor) = case
    assert processor.size == model.config.image_size
    outputs = apply(model, variables, make_images(processor.size))
    assert np.abs(reference["outputs"]).max() > 1
    np.testing.assert_allclose(outputs, reference["outputs"], rtol=0, atol=1e-4)


def test_outputs_at_another_image_size_equal_timm(case):
    reference, _, folder, _ = case
    size = tuple(reference["other_size"].tolist())
    model, variables, _ = pretrained.load(folder, image_size=size)
    outputs = apply(model, variables, make_images(size))
    np.testing.assert_allclose(outputs, reference["resized"], rtol=0, atol=1e-4)


def test_the_key_table_gives_every_tensor_back(case):
    _, tensors, _, (model, variables, _) = case
    found = keys.dump(variables, TIMM.key_table(model.config, ""))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_what_is_saved_is_in_hugging_face_format(case, tmp_path):
    reference, _, _, (model, variables, processor) = case
    pretrained.save(tmp_path / "out", model, variables, processor)
    again = pretrained.load(tmp_path / "out")
    assert (again[0].config, again[2]) == (model.config, processor)
    jax.tree.map(np.testing.assert_array_equal, again[1], variables)
    if not model.config.num_classes:
        return
    theirs, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    images = np.moveaxis(make_images(processor.size), -1, 1).copy()
    with torch.no_grad():
        logits = theirs.eval()(pixel_values=torch.from_numpy(images)).logits.numpy()
    np.testing.assert_allclose(logits, reference["outputs"], rtol=0, atol=1e-4)


def test_what_transformers_saves_of_timm_is_read_too(case, tmp_path):
    """Its `TimmWrapperForImageClassification` keeps the network in `timm_model`."""
    _, tensors, folder, (model, variables, processor) = case
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrapped = {f"timm_model.{name}": tensor for name, tensor in with_counts(tensors).items()}
    formats.write(tmp_path / formats.SINGLE, wrapped)
    found = pretrained.load(tmp_path)
    assert (found[0].config, found[2]) == (model.config, processor)
    jax.tree.map(np.testing.assert_array_equal, found[1], variables)


def test_a_checkpoint_without_a_head_has_no_classes(case, tmp_path):
    _, tensors, folder, (_, variables, _) = case
    config = json.loads((folder / "config.json").read_text()) | {"num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": None}))
    backbone = {
        n: t for n, t in tensors.items() if n.split(".")[0] not in ("head", "head_dist", "fc")
    }
    formats.write(tmp_path / formats.SINGLE, backbone)
    model, found, processor = pretrained.load(tmp_path)
    assert (model.config.num_classes, processor.id2label) == (0, {})
    kept = {n: t for n, t in variables["params"].items() if "classifier" not in n}
    jax.tree.map(np.testing.assert_array_equal, found["params"], kept)


def test_tensors_that_do_not_fit_are_named_as_timm_has_them(case, tmp_path):
    _, tensors, folder, _ = case
    tensors = with_counts(tensors) | {"fc_norm.weight": np.ones(3, np.float32)}
    name = next(iter(tensors))
    del tensors[name]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    formats.write(tmp_path / formats.SINGLE, tensors)
    with pytest.raises(UserError, match=rf"1 missing: {name}\n  1 not known .*: fc_norm.weight$"):
        pretrained.load(tmp_path)


# The config


def config_json(name="vit_tiny_patch16_224", cfg=(), **fields):
    """As `timm/...` on the hub have it, with changed fields; those that are None are left out."""
    cfg = {"input_size": [3, 224, 224], "num_classes": 4, **dict(cfg)}
    fields = {"architecture": name, "num_classes": 4, "pretrained_cfg": cfg} | fields
    return JsonFields(fields, path="config.json")


def read(*args, **kwargs):
    return TIMM.read_config(config_json(*args, **kwargs), 4, None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_tensors_of_timm(name):
    expected = ARCHITECTURES[name]
    num_classes = expected["num_classes"]
    fields = config_json(name, {"input_size": expected["input_size"]})
    config = TIMM.read_config(fields, num_classes, None)
    assert config.image_size == tuple(expected["input_size"][1:])
    if name.startswith("resnet"):
        assert config.activation == "relu" and not config.downsample_in_bottleneck
    else:
        assert config.num_heads == expected["num_heads"]
        assert config.epsilon == expected["epsilon"]
        assert config.activation == expected["activation"].lower()
    shapes = jax.tree_util.tree_leaves_with_path(variable_shapes(config))
    shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in shapes}
    found = {}
    for key in TIMM.key_table(config, ""):
        dummy = np.broadcast_to(np.float32(0), shapes.pop(key.path))
        parts = key.transform.split(dummy, len(key.theirs))
        found |= {name: part.shape for name, part in zip(key.theirs, parts, strict=True)}
    assert not shapes
    lines = "".join(f"{name} {shape}\n" for name, shape in sorted(found.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == expected["tensors"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="deit3_base_patch16_224"), 'architecture="deit3_base_patch16_224" is not suppo'),
        (dict(name="resnet50d"), r"it must be vit_{tiny,.* or resnet{18,34,50,101,152}\."),
        (dict(name="vit_base_patch16_224_miil"), "architecture=.* is not supported"),
        (dict(name=["resnet50"]), "architecture=.* is not supported"),
        (dict(pretrained_cfg=None), "has no pretrained_cfg; save it again with a newer timm"),
        (dict(pretrained_cfg=[3]), "pretrained_cfg holds no JSON object"),
        (dict(cfg={"input_size": [1, 224, 224]}), r"input_size=.* must be \[3, height, width\]"),
        (dict(cfg={"input_size": [3, 224, 230]}), r"not divisible by the patch size .* use \(224,"),
        (dict(global_pool="avg"), "global_pool=\"avg\" is not supported; it must be 'token'"),
        (dict(model_args={"global_pool": "avg"}), "model_args=.* is not supported; it must be amo"),
        (dict(model_args={"depth": 3}), 'model_args={"depth": 3} is not supported'),
        (dict(model_args={"img_size": [256, 256]}), r'among .*"img_size": \[224, 224\]'),
        (dict(model_args=["depth"]), r'model_args=\["depth"\] is not supported'),
    ],
)
def test_unsupported_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        read(**fields)


def test_arguments_that_change_nothing_are_accepted():
    usual = dict(num_classes=4, in_chans=3, img_size=[224, 224], global_pool="token")
    assert read(model_args=usual, global_pool="token") == read() == read(model_args={})
    with pytest.raises(UserError, match="global_pool="):
        read("resnet18", global_pool="token")
    assert read("resnet18", global_pool="avg") == read("resnet18")


def class_names(**fields):
    return list(TIMM.read_class_names(config_json(**fields)).values())


def test_class_names():
    assert class_names() == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    assert class_names(num_classes=None, cfg={"num_classes": 2}) == ["LABEL_0", "LABEL_1"]
    names = ["n1", "n2", "n3", "n4"]
    assert class_names(label_names=names) == names
    assert class_names(cfg={"label_names": names}) == names
    described = {"n3": "cat", "n1": "ant", "n9": "dog"}
    expected = ["ant", "n2", "cat", "n4"]
    assert class_names(label_names=names, label_descriptions=described) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_classes=0), "num_classes=0 is not supported; it must be an integer from 1 to"),
        (dict(label_names=["a", "b"]), r"label_names=.* is not supported; .* a list of 4 names"),
        (dict(label_names={"0": "a"}), "label_names=.* is not supported"),
        (dict(label_names=["a", 1, [], "d"]), "label_descriptions=null .* names of label_names"),
        (dict(label_names=list("abcd"), label_descriptions=["a"]), "label_descriptions=.* an obje"),
        (dict(label_names=list("abcd"), label_descriptions={"a": 1}), "label_descriptions=.* text"),
        (dict(cfg={"label_offset": 1}), "label_offset=1 is not supported; it must be 0"),
    ],
)
def test_broken_class_names_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        class_names(**fields)


# The preprocessing

PIXELS = np.load(GOLDEN / "pixels.npz")


def read_processor(**cfg):
    return TIMM.read_processor(config_json("resnet18", cfg), {})


PIXEL_CASES = [
    (case, tuple(map(int, size.split("x"))))
    for case, _, size in (entry.partition(" ") for entry in PIXELS.files)
    if size
]


@pytest.mark.parametrize(("case", "size"), PIXEL_CASES)
def test_pixels_equal_those_of_timm(case, size):
    expected = np.moveaxis(PIXELS["{} {}x{}".format(case, *size)], 0, -1)
    processor = read_processor(**json.loads(str(PIXELS[case])))
    resize = processor.resize or processor.size
    if isinstance(resize, int):
        resize = [int(resize * side / min(size)) for side in size]
    margins = [old - new for old, new in zip(resize, processor.size, strict=True)]
    top, left = (int(margin % 4 == 3) for margin in margins)  # see `_read_processor`
    found = processor.pixels(make_picture(*size))
    height, width = processor.size
    np.testing.assert_array_equal(found[top:, left:], expected[: height - top, : width - left])


def test_normalised_pixels_equal_those_of_timm():
    case, size = PIXEL_CASES[-1]
    processor = read_processor(**json.loads(str(PIXELS[case])))
    expected = np.moveaxis(PIXELS["normalised"], 0, -1)
    np.testing.assert_allclose(processor([make_picture(*size)])[0], expected, atol=1e-6)


def test_the_shorter_side_equals_that_of_timm():
    for side, crop_pct, expected in PIXELS["resize"].tolist():
        processor = read_processor(input_size=[3, side, side], crop_pct=crop_pct / 1000)
        assert processor.resize == expected


def test_absent_fields_mean_what_they_mean_in_timm():
    expected = pretrained.Processor(
        size=(224, 224), resize=256, resample="bicubic",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    assert TIMM.read_processor(config_json(pretrained_cfg={"tag": "x"}), {}) == expected


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"crop_mode": "border"}, 'crop_mode="border" is not supported; .* one of center, squash'),
        ({"crop_pct": 1.5}, "crop_pct=1.5 is not supported; it must be from 0.02"),
        ({"crop_pct": 0}, "crop_pct=0 is not supported"),
        ({"interpolation": "random"}, 'interpolation="random" is not supported'),
        ({"input_size": [3, 32, 48]}, "must be square where crop_mode is center"),
        ({"std": [1, 0, 1]}, "std=.* must be positive"),
        ({"mean": [0.5]}, "mean=.* must be a list of 3 numbers"),
    ],
)
def test_unsupported_preprocessing_is_named(cfg, message):
    with pytest.raises(UserError, match=message):
        read_processor(**cfg)
