import json
import pickle

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vitcls.errors import UserError
from vitcls.pretrained import Processor, processor

SQUASHING = Processor(size=(16, 24), resample="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
CROPPING = Processor(size=(16, 24), resize=30)
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": 224}


def random_image(height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def read(tmp_path, **fields):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(fields))
    return processor.read(path, id2label={})


@pytest.mark.parametrize("ours", [SQUASHING, CROPPING], ids=["squash", "crop"])
@pytest.mark.parametrize("shape", [(40, 50), (61, 17), (9, 12)])
def test_pixels_equal_the_reference(tmp_path, ours, shape):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_json(ours)))
    theirs = ViTImageProcessorPil.from_pretrained(tmp_path)
    image = random_image(*shape)
    raw = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")
    expected = np.moveaxis(raw["pixel_values"][0], 0, -1)
    np.testing.assert_array_equal(ours.pixels(image), expected)
    normalised = np.moveaxis(theirs(image, return_tensors="np")["pixel_values"], 1, -1)
    found = ours([image])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, normalised, atol=2e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 24, "crop_pct": 0.875},  # 27: 24 / 0.875 is cut, not rounded
        {"size": {"shortest_edge": 20}, "crop_pct": 0.95, "resample": 2},
        {"size": {"shortest_edge": 33}},
        {"size": 384, "crop_pct": None},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 50), (61, 17), (9, 12)])
def test_pixels_equal_the_convnext_reference(tmp_path, fields, shape):
    """That processor is what ResNet checkpoints have: microsoft/resnet-50's has crop_pct 0.875."""
    ours = read(tmp_path, feature_extractor_type="ConvNextFeatureExtractor", **fields)
    theirs = ConvNextImageProcessorPil(**{k: v for k, v in fields.items() if v is not None})
    image = random_image(*shape)
    raw = theirs(image, do_rescale=False, do_normalize=False, return_tensors="np")
    expected = np.moveaxis(raw["pixel_values"][0], 0, -1)
    np.testing.assert_array_equal(ours.pixels(image), expected)
    normalised = np.moveaxis(theirs(image, return_tensors="np")["pixel_values"], 1, -1)
    np.testing.assert_allclose(ours([image]), normalised, atol=2e-6)
    # Written in the format of ViT's processor, it makes the same pixels.
    again = read(tmp_path, **processor.to_json(ours))
    assert again == ours


@pytest.mark.parametrize(
    "ours", [SQUASHING, CROPPING, Processor(size=(8, 8), resize=(9, 10), rescale=1 / 128)]
)
def test_what_is_written_is_read_back(tmp_path, ours):
    assert read(tmp_path, **processor.to_json(ours)) == ours


def test_transformers_loads_what_is_written(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_json(SQUASHING)))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert (theirs.size.height, theirs.size.width) == (16, 24)
    assert theirs.resample == Image.Resampling.BICUBIC


def test_absent_fields_mean_what_they_mean_in_transformers(tmp_path):
    theirs = ViTImageProcessorPil()
    ours = read(tmp_path)
    assert ours.size == (theirs.size["height"], theirs.size["width"])
    assert ours.resample == "bilinear"
    assert ours.resize is None
    assert ours.mean == tuple(theirs.image_mean)
    assert ours.std == tuple(theirs.image_std)
    assert ours.rescale == theirs.rescale_factor


def test_files_of_feature_extractors_are_read(tmp_path):
    ours = read(tmp_path, feature_extractor_type="ViTFeatureExtractor", size=384, resample=3)
    assert ours.size == (384, 384)
    assert ours.resample == "bicubic"


def test_skipped_steps_become_neutral_values(tmp_path):
    ours = read(tmp_path, do_rescale=False, do_normalize=False)
    assert (ours.rescale, ours.mean, ours.std) == (1.0, (0.0,) * 3, (1.0,) * 3)


def test_arrays_and_images_of_any_mode_are_taken():
    image = random_image(30, 20)
    expected = SQUASHING.pixels(image)
    np.testing.assert_array_equal(SQUASHING.pixels(np.asarray(image)), expected)
    grey = SQUASHING.pixels(image.convert("L"))
    assert grey.shape == (16, 24, 3)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    assert SQUASHING([image, np.asarray(image)]).shape == (2, 16, 24, 3)


def test_another_size_keeps_the_proportion_of_the_crop():
    assert SQUASHING.resized((8, 8)).resize is None
    resized = Processor(size=(224, 224), resize=256).resized((112, 112))
    assert (resized.size, resized.resize) == ((112, 112), 128)
    resized = Processor(size=(100, 50), resize=(110, 60)).resized((50, 100))
    assert resized.resize == (55, 120)


def test_worker_processes_can_unpickle_it():
    assert pickle.loads(pickle.dumps(CROPPING)) == CROPPING


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "LevitImageProcessor"}, "Unknown image processor 'LevitImagePr"),
        ({"do_resize": False}, "do_resize=false is not supported; it must be true"),
        ({"do_pad": True}, "do_pad=true is not supported; it must be false"),
        ({"do_resize": "yes"}, 'do_resize="yes" is not supported; it must be true or false'),
        ({"resample": 9}, "resample=9 is not supported; it must be one of"),
        ({"image_mean": [0.5]}, r"image_mean=\[0.5\] is not supported; .* a list of 3 numbers"),
        ({"image_std": [1, 1, 0]}, "image_std=.* is not supported; it must be positive"),
        ({"rescale_factor": "x"}, 'rescale_factor="x" .* a non-negative number'),
        ({"size": {"longest_edge": 3}}, "size=.*longest_edge.* height and width, or shortest_edge"),
        ({"size": {"height": 10**9, "width": 1}}, "size=.* up to 8192"),
        ({"size": {"shortest_edge": 9}}, "size=.* where nothing is cropped"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 9}}, "crop_size=.* or height and"),
        (
            {**CONVNEXT, "crop_pct": 1.5},
            "crop_pct=1.5 is not supported; it must be from 0.0273.* 1",
        ),
        ({**CONVNEXT, "crop_pct": 1e-9}, "crop_pct=1e-09 is not supported"),
        ({**CONVNEXT, "size": {"height": 9, "width": 9}}, "size=.* an integer or shortest_edge"),
        ({**CONVNEXT, "do_center_crop": True}, "do_center_crop=true .* must be false"),
    ],
)
def test_unsupported_values_are_named(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **fields)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)])
def test_other_arrays_are_refused(image):
    with pytest.raises(UserError, match="give uint8 \\(H, W, 3\\) or a PIL image"):
        SQUASHING.pixels(image)
