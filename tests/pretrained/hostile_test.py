"""Configs that are broken or meant to harm: one readable error each, at once, for little memory."""

import itertools
import time
import tracemalloc
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.reading import FAMILIES


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


ABSURD = {
    "negative": -1,
    "zero": 0,
    "one": 1,
    "fraction": 1.5,
    "billion": 10**9,
    "beyond floats": 10**400,
    "tiny": 5e-324,
    "nan": float("nan"),
    "infinity": float("inf"),
    "true": True,
    "number as string": "12",
    "empty string": "",
    "long string": "x" * 10**6,
    "empty list": [],
    "two": [8, 8],
    "wrong three": [0, None, "x"],
    "long list": [1] * 10**6,
    "object": {"a": 1},
    "object of sides": {"height": 10**9, "width": -1},
    "deep list": nested(500),
    "deeper list": nested(100_000),
    "many": {str(index): "x" for index in range(200_000)},
}
# Which transformers takes as either integers or floats, and as both only in older releases.
ANY_NUMBER = {"layer_norm_eps", "mlp_ratio"}
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
TOWER = "config.json, vision_config"  # as messages name it


class Recorded(JsonFields):
    """Remembers which fields are read, as (path, name)."""

    seen: ClassVar[set[tuple[str, str]]] = set()

    def any(self, name, default=None):
        self.seen.add((self.path, name))
        return super().any(name, default)

    def group(self, name):
        return Recorded(self.any(name, {}), path=f"{self.path}, {name}")


@pytest.fixture
def read(monkeypatch):
    """A function that reads a checkpoint's two files, given by their names, from memory."""
    contents = {}

    def read(files):
        contents.update(files)
        return pretrained.read_json(Path(), tensors=None)

    monkeypatch.setattr(Recorded, "seen", set())
    monkeypatch.setattr(
        JsonFields, "read", lambda path: Recorded(contents[path.name], path=path.name)
    )
    return read


def with_value(files, path, name, value):
    if path == TOWER:
        return files | {CONFIG: files[CONFIG] | {"vision_config": {name: value}}}
    return files | {path: files[path] | {name: value}}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absurd_values_are_refused_or_what_transformers_takes(read, model_type):
    """Every value in every field, for the memory of about the value itself."""
    tower = {"vision_config": {}} if model_type in ("clip", "siglip") else {}
    files = {
        CONFIG: {"model_type": model_type, **tower},
        PREPROCESSOR: {"image_processor_type": FAMILIES[model_type].processor_type},
    }
    read(files)
    assert len(Recorded.seen) > 20
    slowest = 0.0
    tracemalloc.start()
    for (path, name), (kind, value) in itertools.product(Recorded.seen.copy(), ABSURD.items()):
        changed = with_value(files, path, name, value)
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.process_time()
        message = ""
        try:
            read(changed)
        except UserError as error:
            message = str(error)
        slowest = max(slowest, time.process_time() - start)
        assert tracemalloc.get_traced_memory()[1] - before < 32 << 20, (name, kind)
        assert len(message) < 1000, (name, kind)
        # Thousands of fields that nobody knows are nothing to us, and take transformers a minute.
        if not message and path != PREPROCESSOR and name not in ANY_NUMBER and kind != "many":
            transformers.AutoConfig.for_model(**changed[CONFIG])
    tracemalloc.stop()
    assert slowest < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": {"a": 1}}, r'model_type={"a": 1} is not supported; it must be a string'),
        ({"model_type": "x" * 100}, 'model_type="xxx.* a string of up to 80 characters'),
        ({"model_type": "clip", "vision_config": [1]}, "config.json, vision_config holds no JSON"),
        (
            {"image_size": 8192, "patch_size": 1},
            r"image_size=\(8192, 8192\) makes 67108864 patches of \(1, 1\), more than 65536",
        ),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps=1000.* a non-negative number"),
        ({"hidden_size": nested(100_000)}, r"hidden_size=\[\[\[.*\.\.\. is not supported"),
        (
            {"model_type": "resnet", "depths": [256, 256], "hidden_sizes": [8, 8]},
            r"depths=\[256, 256\] .* at most 256 layers in all",
        ),
    ],
)
def test_what_is_refused_is_named(read, fields, message):
    with pytest.raises(UserError, match=message) as error:
        read({CONFIG: {"model_type": "vit"} | fields, PREPROCESSOR: {}})
    assert len(str(error.value)) < 300


def test_preprocessing_cannot_ask_for_a_table_of_gigabytes(read):
    """DINOv2's positions are resized to what the preprocessing makes."""
    files = {
        CONFIG: {"model_type": "dinov2", "image_size": 14, "patch_size": 1},
        PREPROCESSOR: {"crop_size": 8192},
    }
    with pytest.raises(UserError, match="makes 67108864 patches"):
        read(files)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not readable JSON"),
        (b'{"model_type": ' + b"9" * 5000 + b"}", "is not readable JSON"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"", "is not readable JSON"),
        (b"null", "holds no JSON object"),
        (b"\0" * ((64 << 20) + 1), "more than 67108864 bytes"),
    ],
    ids=["deep", "long number", "no UTF-8", "empty", "null", "huge"],
)
def test_files_that_are_no_config_are_named(tmp_path, content, message):
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=f"config.json .*{message}"):
        pretrained.read_json(tmp_path, tensors=None)


@pytest.mark.parametrize("model_type", ["vit", "clip"])
def test_one_error_names_every_tensor_that_does_not_fit(tmp_path, model_type):
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=8, patch_size=4,
    )  # fmt: skip
    if model_type == "vit":
        network = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
        layer, kernel = "vit.encoder.layer.0", "intermediate.dense"
    else:
        config = transformers.CLIPConfig(vision_config=sizes, text_config=sizes)
        network = transformers.CLIPForImageClassification(config)
        layer, kernel = "vision_model.encoder.layers.0", "mlp.fc1"
    network.save_pretrained(tmp_path)
    (tmp_path / PREPROCESSOR).write_text("{}")
    pretrained.load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.biases"] = weights.pop("classifier.bias")
    weights.pop(f"{layer}.{kernel}.bias")
    weights[f"{layer}.{kernel}.weight"] = np.zeros((8, 9), np.float32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        pretrained.load(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        f"  2 missing: classifier.bias, {layer}.{kernel}.bias",
        "  1 not known to this network: classifier.biases",
        f"  1 of another shape: {layer}.{kernel}.weight is (8, 9), not (8, 8)",
    ]
