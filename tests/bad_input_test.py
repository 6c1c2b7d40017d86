"""What users get wrong, as a run sees it: one message, the right exit code, and nothing begun."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from vitcls import train
from vitcls.config.fields import default_config
from vitcls.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes of six images each."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "eel"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pets/{name}/{number}.png")
    return tmp_path / "pets"


@pytest.fixture
def config(folder):
    """A run that would succeed."""
    config = default_config()
    config.data.source = f"folder:{folder}"
    config.data.holdout = 0.25
    config.data.image_size = (8, 8)
    config.data.num_threads = 2
    config.model.arch = "vit_mu4"
    config.train.total_steps = 3
    config.train.global_batch_size = 8
    return config


def start_from_a_checkpoint(config, tmp_path, *, num_labels: int) -> None:
    network = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=num_labels,
    )  # fmt: skip
    transformers.ViTForImageClassification(network).save_pretrained(tmp_path / "weights")
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "weights")
    config.model.arch = ""
    config.model.pretrained = str(tmp_path / "weights")


def missing_folder(config, folder, tmp_path):
    config.data.source = f"folder:{tmp_path}/pest"


def empty_folder(config, folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    config.data.source = f"folder:{tmp_path}/nothing"


def class_without_images(config, folder, tmp_path):
    for path in (folder / "dog").iterdir():
        path.unlink()


def most_images_bad(config, folder, tmp_path):
    config.data.on_error = "skip"
    for path in folder.glob("*/*.png"):
        path.write_text("not an image")


def batch_that_devices_do_not_divide(config, folder, tmp_path):
    config.train.global_batch_size = 12


def patch_that_does_not_divide_the_image(config, folder, tmp_path):
    config.data.image_size = (8, 10)


def kept_head_of_other_classes(config, folder, tmp_path):
    start_from_a_checkpoint(config, tmp_path, num_labels=5)
    config.model.head = "keep"


def checkpoint_of_another_network(config, folder, tmp_path):
    start_from_a_checkpoint(config, tmp_path, num_labels=3)
    path = tmp_path / "weights/config.json"
    path.write_text(path.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))


def pattern_that_matches_nothing(config, folder, tmp_path):
    config.adapt.freeze = "encoder"


def mesh_that_does_not_fit(config, folder, tmp_path):
    config.mesh.fsdp = 3


def passes_of_less_than_an_image(config, folder, tmp_path):
    config.train.micro_batch = -1


def passes_that_do_not_divide_the_batch(config, folder, tmp_path):
    config.train.global_batch_size = 8 * 61
    config.train.micro_batch = 32


def mistyped_cache(config, folder, tmp_path):
    config.data.cache = "rma"
    config.data.source = "tfds:never_prepared"


def dropout_of_a_resnet(config, folder, tmp_path):
    config.model.arch = "resnet_mu"
    config.model.dropout = 0.1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (missing_folder, "data.source: .*/pest does not exist"),
        (empty_folder, "nothing .*class"),
        (class_without_images, "dog"),
        (most_images_bad, "More than half of the .* images in 'train' cannot be used"),
        (batch_that_devices_do_not_divide, "=12 is not divisible by 8 devices; use 8 or 16"),
        (patch_that_does_not_divide_the_image, r"\(8, 10\) is not divisible by the patch size"),
        (kept_head_of_other_classes, "keeps 5 classes, but the data has 3; use model.head='new'"),
        (checkpoint_of_another_network, "do not fit the network that its config describes"),
        (pattern_that_matches_nothing, "adapt.freeze='encoder' matches no parameter"),
        (mesh_that_does_not_fit, "mesh.fsdp=3 does not make 8 devices"),
        (
            passes_of_less_than_an_image,
            "train.micro_batch=-1 is out of range: it must be at least 0",
        ),
        (passes_that_do_not_divide_the_batch, "=32 does not suit the 61 images .* of 1 or 61"),
        (mistyped_cache, "data.cache='rma' is neither 'ram' nor a folder that exists"),
        (dropout_of_a_resnet, "a ResNet has neither"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_mistakes_end_a_run_before_it_saves(mistake, message, config, folder, tmp_path):
    mistake(config, folder, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        train.train_and_evaluate(config, tmp_path / "run")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value) or "  " in str(error.value)  # a line, or a list
    if mistake is not most_images_bad:  # which shows only once images are read
        assert not (tmp_path / "run").exists()
