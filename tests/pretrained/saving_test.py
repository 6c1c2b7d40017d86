import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained.files import formats

CONFIG = ViTConfig(
    image_size=(8, 8),
    patch_size=(4, 4),
    width=8,
    depth=1,
    num_heads=2,
    mlp_dim=12,
    num_classes=2,
)
PROCESSOR = pretrained.Processor(size=(8, 8), id2label={0: "ant", 1: "bee"})


@pytest.fixture(scope="module")
def variables():
    init = jax.jit(pretrained.make_model(CONFIG).init, static_argnames="train")
    return init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)


def test_a_saved_folder_holds_exactly_three_files(tmp_path, variables):
    (tmp_path / "out").mkdir()  # an empty folder is as good as a new one
    pretrained.save(tmp_path / "out", pretrained.make_model(CONFIG), variables, PROCESSOR)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_precision_halves_the_file_and_is_read_as_float32(tmp_path, variables):
    model = pretrained.make_model(CONFIG)
    for name, dtype in (("whole", None), ("half", np.float16), ("brain", jnp.bfloat16)):
        pretrained.save(tmp_path / name, model, variables, PROCESSOR, dtype=dtype)
        _, loaded, _ = pretrained.load(tmp_path / name)
        for found, kept in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, np.asarray(kept, dtype).astype(np.float32))
    sizes = [(tmp_path / n / formats.SINGLE).stat().st_size for n in ("whole", "half", "brain")]
    assert max(sizes[1:]) < 0.8 * sizes[0]


def test_write_config_writes_the_two_json_files_again_and_again(tmp_path):
    for _ in range(2):
        pretrained.write_config(tmp_path / "run" / "model", CONFIG, PROCESSOR)
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert names == {"config.json", "preprocessor_config.json"}
    content = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert content["architectures"] == ["ViTForImageClassification"]
    assert content["id2label"] == {"0": "ant", "1": "bee"}
    assert content["label2id"] == {"ant": 0, "bee": 1}


def test_a_folder_in_use_is_left_alone(tmp_path, variables):
    (tmp_path / "note.txt").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder; name another"):
        pretrained.save(tmp_path, pretrained.make_model(CONFIG), variables, PROCESSOR)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_every_class_needs_a_name(tmp_path, variables):
    unnamed = dataclasses.replace(PROCESSOR, id2label={0: "ant"})
    with pytest.raises(UserError, match="has 2 classes and the processor's id2label names 1"):
        pretrained.save(tmp_path / "out", pretrained.make_model(CONFIG), variables, unnamed)
    assert not list(tmp_path.iterdir())
