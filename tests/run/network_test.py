"""The network of a run: heads, sizes, and how its images are prepared."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.run.configs import make_config
from vitcls import pretrained, train
from vitcls.checkpoints.manager import Checkpoints
from vitcls.errors import UserError
from vitcls.models import vit_config
from vitcls.pretrained.files import formats
from vitcls.run import network, splits

DIGITS = tuple(str(digit) for digit in range(10))


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory):
    """Returns a function that writes a checkpoint with the given class names."""

    def make(class_names: tuple[str, ...]) -> str:
        config = vit_config.vit_config("vit_mu4", num_classes=len(class_names), image_size=(8, 8))
        model = pretrained.make_model(config)
        variables = jax.jit(functools.partial(model.init, train=False))(
            jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )
        processor = pretrained.Processor(size=(8, 8), id2label=dict(enumerate(class_names)))
        directory = tmp_path_factory.mktemp("checkpoint") / "model"
        pretrained.save(directory, model, variables, processor)
        return str(directory)

    return make


def test_pickles_are_read_when_allowed(make_checkpoint):
    folder = Path(make_checkpoint(("cat", "dog")))
    torch.save(load_file(folder / formats.SINGLE), folder / "pytorch_model.bin")
    (folder / formats.SINGLE).unlink()
    with pytest.raises(UserError, match="as a pickle only"):
        network.open_model(make_config(str(folder)), DIGITS)
    files, _, _ = network.open_model(make_config(str(folder), allow_pickle=True), DIGITS)
    assert "pytorch_model.bin" in files.sha256()


def test_new_head_takes_the_classes_of_the_data(make_checkpoint):
    config = make_config(make_checkpoint(("cat", "dog")))
    files, model_config, processor = network.open_model(config, DIGITS)
    assert model_config.num_classes == 10
    assert processor.class_names == DIGITS
    params = pretrained.read_variables(files, model_config, new_head=True)["params"]
    assert not params["classifier"]["kernel"].any()


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": {"0": "cat", "7": "dog"}},
        {"id2label": None, "num_labels": 1000},
        {"id2label": 3},
    ],
)
def test_a_head_that_is_not_kept_need_not_fit(make_checkpoint, fields):
    folder = Path(make_checkpoint(("cat", "dog")))
    content = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(content))
    files, model_config, processor = network.open_model(make_config(str(folder)), DIGITS)
    assert processor.class_names == DIGITS
    params = pretrained.read_variables(files, model_config, new_head=True)["params"]
    assert params["classifier"]["kernel"].shape == (32, 10)
    with pytest.raises(UserError):
        network.open_model(make_config(str(folder), head="keep"), DIGITS)


def test_a_kept_head_may_have_numbers_for_names(make_checkpoint):
    folder = Path(make_checkpoint(DIGITS))
    content = json.loads((folder / "config.json").read_text())
    content["id2label"] = {str(number): number - 1 for number in range(1, 11)}
    (folder / "config.json").write_text(json.dumps(content))
    _, _, processor = network.open_model(make_config(str(folder), head="keep"), DIGITS)
    assert processor.class_names == DIGITS


def test_kept_head_keeps_its_class_names(make_checkpoint, caplog):
    names = tuple(f"digit {digit}" for digit in range(10))
    config = make_config(make_checkpoint(names), head="keep")
    _, model_config, processor = network.open_model(config, DIGITS)
    assert model_config.num_classes == 10
    assert processor.class_names == names


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (("cat", "dog"), "keeps 2 classes, but the data has 10; use model.head='new'"),
        (DIGITS[::-1], "has the data's classes in another order"),
    ],
)
def test_kept_head_that_does_not_fit_is_refused(make_checkpoint, class_names, message):
    config = make_config(make_checkpoint(class_names), head="keep")
    with pytest.raises(UserError, match=message):
        network.open_model(config, DIGITS)


@pytest.mark.parametrize("arch", ["vit_mu4", "resnet18", "resnet_mu"])
def test_architectures_of_every_family_are_known(arch):
    config = make_config("", arch=arch)
    config.data.image_size = (32, 48)
    files, model_config, processor = network.open_model(config, DIGITS)
    assert files is None
    assert model_config.num_classes == 10
    assert model_config.image_size == processor.size == (32, 48)


def test_unknown_architectures_list_every_family():
    config = make_config("", arch="resnt50")
    config.data.image_size = (32, 32)
    with pytest.raises(UserError, match="Did you mean 'resnet50'.*resnet18.*vit_b16"):
        network.open_model(config, DIGITS)


def test_image_size_comes_from_the_config_or_the_checkpoint(make_checkpoint):
    config = make_config(make_checkpoint(DIGITS))
    assert network.open_model(config, DIGITS)[1].image_size == (8, 8)
    config.data.image_size = (12, 16)
    _, model_config, processor = network.open_model(config, DIGITS)
    assert model_config.image_size == processor.size == (12, 16)
    config.data.image_size = (10, 10)
    with pytest.raises(UserError, match="not divisible by the patch"):
        network.open_model(config, DIGITS)


def test_black_borders_are_announced(make_checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(splits.log, "propagate", True)
    folder = Path(make_checkpoint(DIGITS))
    content = {"image_processor_type": "CLIPImageProcessor", "size": 9, "crop_size": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    config = make_config(str(folder))
    for size, resize, is_padded in [((8, 8), 0, 0), ((8, 16), 16, 0), ((8, 16), 0, 1)]:
        caplog.clear()
        config.data.update(image_size=size, resize=resize)
        processor = network.open_model(config, DIGITS)[2]
        corner = processor.pixels(np.full((20, 20, 3), 255, np.uint8))[0, 0]
        assert corner.tolist() == [0 if is_padded else 255] * 3
        assert ("black borders; data.resize=16 would cut" in caplog.text) == bool(is_padded)


def test_resize_smaller_than_the_image_is_refused(make_checkpoint):
    config = make_config(make_checkpoint(DIGITS))
    config.data.resize = 7
    with pytest.raises(UserError, match="data.resize=7 is smaller than the image size"):
        network.open_model(config, DIGITS)


def test_a_workdir_is_no_checkpoint_to_start_from(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match="is the workdir of a run. Write its weights to a folder"):
        network.open_model(make_config(str(tmp_path)), DIGITS)


def test_resize_of_the_config_wins_over_the_checkpoint(make_checkpoint):
    config = make_config(make_checkpoint(DIGITS))
    config.data.resize = 10
    assert network.open_model(config, DIGITS)[2].resize == 10


def test_fine_tuning_starts_from_the_checkpoint(make_checkpoint, digits_dir, tmp_path):
    """The backbone of a frozen run is the checkpoint's, and the first loss is ln K."""
    config = make_config(make_checkpoint(("cat", "dog")))
    config.data.data_dir = digits_dir
    config.adapt.freeze = "(embeddings|encoder|layernorm)/.*"
    config.log.every_steps = 1
    train.train_and_evaluate(config, tmp_path)
    first_line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert f'"train/loss": {np.log(10):.4f}'[:-1] in first_line
    _, variables, processor = pretrained.load(tmp_path)
    expected = pretrained.load(config.model.pretrained)[1]["params"]
    for name in ("embeddings", "encoder", "layernorm"):
        jax.tree.map(np.testing.assert_array_equal, variables["params"][name], expected[name])
    assert processor.class_names == DIGITS
    assert variables["params"]["classifier"]["kernel"].any()


@pytest.mark.slow
def test_l2_sp_keeps_the_weights_it_began_with(make_checkpoint, digits_dir, tmp_path):
    config = make_config(make_checkpoint(("cat", "dog")))
    config.data.data_dir = digits_dir
    config.adapt.l2_sp = 0.1
    config.eval.batch_size = 512
    train.train_and_evaluate(config, tmp_path)
    start = pretrained.load(config.model.pretrained)[1]["params"]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        after = checkpoints._manager.restore(2)
    kept = after["opt_state"][1]  # after clipping
    assert not kept.pop("classifier")["kernel"].any()  # the new head's, of other classes
    del start["classifier"]
    jax.tree.map(np.testing.assert_array_equal, kept, start)
    moved = after["params"]["params"]["encoder"]["layer_0"]["mlp"]["output"]["kernel"]
    assert not np.array_equal(moved, start["encoder"]["layer_0"]["mlp"]["output"]["kernel"])
