"""Features are torch's, every example's once, and are computed again only where they must be."""

import contextlib
import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from overflow import MESSAGE, overflowing
from PIL import Image

from vitcls.data import sources
from vitcls.errors import NotFinite, UserError
from vitcls.probe import features


def save_checkpoint(folder: Path, *, seed: int = 0, num_classes: int = 7) -> Path:
    """A random ViT for 8 pixels; its backbone depends on the seed only."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=num_classes,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.vit.parameters():
            param.copy_(0.5 * torch.randn_like(param))
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def save_images(root: Path, num: int, *, seed: int = 0) -> Path:
    """Random images of three classes that differ in colour, of a size that needs no resizing."""
    rng = np.random.default_rng(seed)
    for number in range(num):
        label = number % 3
        path = root / ("ant", "bee", "cat")[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (8, 8, 3), np.uint8)
        pixels[..., label] += 50
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def backbone(checkpoint) -> features.Backbone:
    return features.load_backbone(checkpoint)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> sources.Split:
    root = tmp_path_factory.mktemp("data")
    save_images(root / "test", 19)
    return sources.open_split(f"folder:{root}", "test")


@pytest.fixture
def no_work(monkeypatch):
    """Whatever is computed from now on is an error."""

    def extract(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(features, "extract", extract)


@pytest.mark.parametrize("batch_size", [0, 8])  # of 8 devices: one batch, and three
def test_features_are_torchs_in_the_splits_order(checkpoint, backbone, split, batch_size):
    found = features.extract(backbone, split, batch_size=batch_size)
    model = transformers.ViTForImageClassification.from_pretrained(checkpoint)
    pixels = np.stack([np.asarray(split.image(i)[0], np.float32) for i in range(19)])
    with torch.no_grad():
        inputs = torch.from_numpy(np.moveaxis(pixels / 127.5 - 1, -1, 1).copy())
        expected = model.vit(inputs).last_hidden_state[:, 0].numpy()
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, expected, atol=1e-4)
    np.testing.assert_array_equal(found.labels, split.labels())


def test_a_second_call_computes_nothing(backbone, split, tmp_path, request):
    found = features.features_of(backbone, split, folder=tmp_path)
    request.getfixturevalue("no_work")
    again = features.features_of(backbone, split, folder=tmp_path)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_what_the_features_depend_on_and_what_not(backbone, split, tmp_path, request):
    features.features_of(backbone, split, folder=tmp_path / "features")
    request.getfixturevalue("no_work")

    def find(backbone=backbone, split=split) -> None:
        features.features_of(backbone, split, folder=tmp_path / "features")

    find(features.load_backbone(save_checkpoint(tmp_path / "head", num_classes=3)))
    mean = dataclasses.replace(backbone.processor, mean=(0.4, 0.5, 0.5))
    other_images = save_images(tmp_path / "data" / "test", 19, seed=1)
    for changed in (
        {"backbone": features.load_backbone(save_checkpoint(tmp_path / "weights", seed=1))},
        {"backbone": dataclasses.replace(backbone, processor=mean)},
        {"split": sources.open_split(f"folder:{other_images.parent}", "test")},
        {"split": sources.Subset("test", split, indices=np.arange(5))},
    ):
        with pytest.raises(AssertionError, match="computed"):
            find(**changed)


def test_a_damaged_file_is_written_again(backbone, split, tmp_path, caplog):
    found = features.features_of(backbone, split, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"", whole[:200] + b"?" * 40 + whole[240:]):
        path.write_bytes(damaged)
        again = features.features_of(backbone, split, folder=tmp_path)
        np.testing.assert_array_equal(again.features, found.features)
        assert path.read_bytes() == whole


def test_an_image_that_cannot_be_read_leaves_no_file(backbone, split, tmp_path):
    root = save_images(tmp_path / "data" / "test", 9).parent
    (root / "test" / "bee" / "001.png").write_bytes(b"no image")
    bad = sources.open_split(f"folder:{root}", "test")
    with pytest.raises(UserError, match="bee/001.png"):
        features.features_of(backbone, bad, folder=tmp_path / "features")
    assert not list((tmp_path / "features").glob("*"))
    shutil.rmtree(root)


def test_features_that_are_not_finite_are_refused_and_not_kept(checkpoint, split, tmp_path):
    bad = features.load_backbone(overflowing(checkpoint, tmp_path / "bad"))
    folder = tmp_path / "features"
    with pytest.raises(NotFinite, match=MESSAGE.format("19 of 19", "test/ant/000.png, ")):
        features.features_of(bad, split, folder=folder)
    assert not folder.exists()


def test_kept_features_that_are_not_finite_are_computed_again(backbone, split, tmp_path):
    found = features.features_of(backbone, split, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    np.savez(path, features=np.full_like(found.features, np.nan), labels=found.labels)
    again = features.features_of(backbone, split, folder=tmp_path)
    np.testing.assert_array_equal(again.features, found.features)


# An interrupted call. 19 images in batches of 8: three steps.


class Steps:
    """Counts the steps of the network, the last of which may be interrupted."""

    def __init__(self, monkeypatch):
        self.num, self.num_until_interrupt = 0, np.inf
        compile_forward = features.compile_forward

        def counting(*args, **kwargs):
            step, batch_size = compile_forward(*args, **kwargs)

            def counted(*inputs):
                if self.num >= self.num_until_interrupt:
                    raise KeyboardInterrupt
                self.num += 1
                return step(*inputs)

            return counted, batch_size

        monkeypatch.setattr(features, "compile_forward", counting)
        monkeypatch.setattr(features, "SHARD_SECS", 0)

    @contextlib.contextmanager
    def interrupted_after(self, num: int):
        self.num, self.num_until_interrupt = 0, num
        with pytest.raises(KeyboardInterrupt):
            yield
        self.num, self.num_until_interrupt = 0, np.inf


@pytest.fixture
def steps(monkeypatch) -> Steps:
    return Steps(monkeypatch)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.unfinished/*"))


@pytest.mark.parametrize("num", [0, 1, 2])
def test_an_interrupted_call_resumes_with_the_same_bits(
    backbone, split, steps, num, tmp_path, caplog
):
    whole = features.features_of(backbone, split, folder=tmp_path / "whole", batch_size=8)
    assert steps.num == 3
    folder = tmp_path / "features"
    with steps.interrupted_after(num):
        features.features_of(backbone, split, folder=folder, batch_size=8)
    assert shards(folder) == ["000000000.npz", "000000008.npz"][:num]
    with caplog.at_level(logging.INFO):
        found = features.features_of(backbone, split, folder=folder, batch_size=8)
    assert steps.num == 3 - num
    assert (f"{8 * num} of 19 images are in {folder}" in caplog.text) == bool(num)
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    (path,), (expected,) = folder.iterdir(), (tmp_path / "whole").iterdir()
    assert path.name == expected.name and path.read_bytes() == expected.read_bytes()


def test_shards_of_all_images_are_all_that_is_needed(backbone, split, steps, tmp_path, monkeypatch):
    """As after an interruption between the last batch and the file of the whole split."""

    def refuse(*args):
        raise KeyboardInterrupt

    part = sources.Subset("test", split, indices=np.arange(16))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features.inference, "check_answers", refuse)
        features.features_of(backbone, part, folder=tmp_path, batch_size=8)
    (first,) = tmp_path.glob("*.unfinished/*")
    last = features.extract(
        backbone, sources.Subset("test", split, indices=np.arange(8, 16)), batch_size=8
    )
    features._write(first.with_name("000000008.npz"), last)
    steps.num = 0
    found = features.features_of(backbone, part, folder=tmp_path, batch_size=8)
    assert steps.num == 0
    np.testing.assert_array_equal(found.features[8:], last.features)


def test_shards_of_something_else_are_named_and_not_used(backbone, split, steps, tmp_path, caplog):
    folder = tmp_path / "features"
    with steps.interrupted_after(2):
        features.features_of(backbone, split, folder=folder, batch_size=8)
    (kept,) = folder.glob("*.unfinished")
    other_weights = features.load_backbone(save_checkpoint(tmp_path / "weights", seed=1))
    other_images = sources.Subset("test", split, indices=np.arange(1, 19))
    for changed, num in (
        ({"backbone": other_weights}, 3),
        ({"split": other_images}, 3),
        ({"batch_size": 16}, 2),
    ):
        steps.num = 0
        caplog.clear()
        with caplog.at_level(logging.INFO):
            features.features_of(
                **{"backbone": backbone, "split": split, "batch_size": 8} | changed, folder=folder
            )
        assert steps.num == num
        assert f"{kept} is not used here: it has features of another checkpoint" in caplog.text
    # The last one finished the same features, so that nothing is left to resume.
    assert not list(folder.glob("*.unfinished")) and len(list(folder.iterdir())) == 3


def test_a_damaged_shard_and_those_behind_it_are_computed_again(
    backbone, split, steps, tmp_path, caplog
):
    whole = features.extract(backbone, split, batch_size=8)
    for damage, num in (("000000000.npz", 3), ("000000008.npz", 2)):
        folder = tmp_path / damage
        with steps.interrupted_after(2):
            features.features_of(backbone, split, folder=folder, batch_size=8)
        (path,) = folder.glob(f"*.unfinished/{damage}")
        path.write_bytes(path.read_bytes()[:-50])
        found = features.features_of(backbone, split, folder=folder, batch_size=8)
        assert steps.num == num and f"{path} is damaged" in caplog.text
        np.testing.assert_array_equal(found.features, whole.features)


def test_an_interruption_while_a_shard_is_written_leaves_whole_shards(
    backbone, split, steps, tmp_path, monkeypatch
):
    savez, written = np.savez, []

    def interrupted(file, **arrays):
        if written:
            file.write(b"half")
            raise KeyboardInterrupt
        written.append(savez(file, **arrays))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", interrupted)
        features.features_of(backbone, split, folder=tmp_path, batch_size=8)
    assert shards(tmp_path) == ["000000000.npz"]


def test_shards_that_are_not_finite_are_not_kept(checkpoint, split, steps, tmp_path):
    bad = features.load_backbone(overflowing(checkpoint, tmp_path / "bad"))
    folder = tmp_path / "features"
    with pytest.raises(NotFinite, match=MESSAGE.format("19 of 19", "test/ant/000.png, ")):
        features.features_of(bad, split, folder=folder, batch_size=8)
    assert not list(folder.iterdir())


def test_a_call_that_takes_seconds_writes_no_shards(backbone, split, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_SECS", 20)
    with steps.interrupted_after(2):
        features.features_of(backbone, split, folder=tmp_path, batch_size=8)
    assert not list(tmp_path.iterdir())
