import io
import itertools
import json
import pickle

import numpy as np
import pytest
import transformers
from PIL import Image

from vitcls.data import images
from vitcls.errors import UserError
from vitcls.pretrained import Processor, processor
from vitcls.pretrained.files.json_fields import JsonFields

SQUASHING = Processor(size=(16, 24), resample="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
CROPPING = Processor(size=(16, 24), resize=30)
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": 224}


def random_image(height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def read(tmp_path, **fields):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(fields))
    return processor.read(JsonFields.read(path), id2label={})


def type_(name):
    return {"image_processor_type": name}


def check_equal(ours, theirs, image):
    """Bytes are equal after cropping and resizing, and floats within rounding at the end."""
    raw = theirs(image, do_convert_rgb=True, do_rescale=False, do_normalize=False)["pixel_values"]
    np.testing.assert_array_equal(ours.pixels(image), np.moveaxis(raw[0], 0, -1))
    normalised = theirs(image, do_convert_rgb=True, return_tensors="np")["pixel_values"]
    found = ours([image])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.moveaxis(normalised, 1, -1), atol=2e-6)


SHAPES = [(40, 50), (61, 17), (9, 12)]
# As in openai/clip-vit-base-patch32 and in facebook/deit-base-distilled-patch16-224: without a
# type of image processor, and with integers for sizes.
OLD_CLIP = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
OLD_DEIT = OLD_CLIP | {
    "feature_extractor_type": "DeiTFeatureExtractor", "size": 256,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((f"{name}ImageProcessor", {}) for name in ("ViT", "DeiT", "Bit", "CLIP", "Siglip")),
        ("ViTImageProcessor", {"size": {"height": 20, "width": 31}, "resample": 3}),
        ("ViTImageProcessor", {"size": 33, "do_center_crop": True, "crop_size": 30}),
        ("DeiTImageProcessor", {"size": 33, "crop_size": {"height": 31, "width": 20}}),
        ("DeiTImageProcessor", {"size": 32, "do_center_crop": False, "resample": 2}),
        ("BitImageProcessor", {"size": {"shortest_edge": 30}, "crop_size": 27}),
        ("CLIPImageProcessor", {"size": {"height": 30, "width": 28}, "crop_size": 25}),
        ("SiglipImageProcessor", {"size": {"height": 30, "width": 28}, "rescale_factor": 1 / 127}),
        ("SiglipImageProcessor", {"size": 30, "do_center_crop": True, "crop_size": 28}),
        ("CLIPImageProcessor", OLD_CLIP),
        ("DeiTImageProcessor", OLD_DEIT),
        # 27: 24 / 0.875 is cut, not rounded; microsoft/resnet-50 has this crop_pct.
        ("ConvNextImageProcessor", {"size": 24, "crop_pct": 0.875}),
        (
            "ConvNextImageProcessor",
            {"size": {"shortest_edge": 20}, "crop_pct": 0.95, "resample": 2},
        ),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 33}}),
        ("ConvNextImageProcessor", {"size": 384, "crop_pct": None}),
        ("ConvNextImageProcessor", {}),
    ],
    ids=str,
)
def test_files_mean_what_they_mean_in_transformers(tmp_path, name, fields):
    ours = read(tmp_path, **({} if "feature_extractor_type" in fields else type_(name)) | fields)
    theirs = getattr(transformers, f"{name}Pil")(**fields)
    for shape in SHAPES:
        check_equal(ours, theirs, random_image(*shape))
    # What is written makes the same pixels, in a type that older readers know to crop.
    assert read(tmp_path, **processor.to_json(ours)) == ours


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (SQUASHING, "ViTImageProcessor"),
        (CROPPING, "CLIPImageProcessor"),
        (Processor(size=(16, 24), resize=(20, 25)), "DeiTImageProcessor"),
    ],
    ids=["squash", "shorter side", "both sides"],
)
def test_transformers_makes_the_same_pixels_of_what_is_written(tmp_path, ours, name):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor.to_json(ours)))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs).__name__ == f"{name}Pil"
    for shape in SHAPES:
        check_equal(ours, theirs, random_image(*shape))


@pytest.mark.parametrize(
    "spelling", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"]
)
def test_every_spelling_of_a_type_is_known(tmp_path, spelling):
    assert read(tmp_path, image_processor_type=spelling) == read(
        tmp_path, feature_extractor_type="CLIPFeatureExtractor"
    )


def images_of_many_kinds():
    """50 images: every mode in three shapes, and every shape of its own."""
    rng = np.random.default_rng(5)

    def noise(height, width):
        return Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")

    modes = ["RGB", "L", "LA", "RGBA", "P", "PA", "1", "CMYK", "YCbCr", "HSV"]
    for mode, (height, width) in itertools.product(modes, [(40, 50), (61, 17), (9, 12)]):
        yield noise(height, width).convert(mode)
    for mode, transparency in (("P", 3), ("P", bytes(range(256))), ("L", 7), ("RGB", (1, 2, 3))):
        image = noise(33, 47).convert(mode)
        image.info["transparency"] = transparency
        yield image
    shapes = [
        (1, 1), (1, 2), (2, 1), (3, 3), (1, 90), (90, 1), (7, 500), (500, 7), (499, 333),
        (333, 499), (500, 500), (28, 28), (32, 32), (27, 29), (64, 48), (255, 257),
    ]  # fmt: skip
    for height, width in shapes:
        yield noise(height, width).convert("RGB")


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ViTImageProcessor", {"size": {"height": 28, "width": 32}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": 28}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 28}}),
    ],
    ids=["squash", "shorter side", "ConvNext"],
)
def test_pixels_equal_the_reference_for_images_of_many_kinds(tmp_path, name, fields, resample):
    """All but 16-bit grey, which the reference clips to white."""
    fields = fields | {"resample": int(resample)}
    ours = read(tmp_path, **type_(name), **fields)
    theirs = getattr(transformers, f"{name}Pil")(**fields)
    images = list(images_of_many_kinds())
    assert len(images) == 50
    for image in images:
        check_equal(ours, theirs, image)


def test_class_names_are_in_the_order_of_the_logits():
    assert Processor(size=(8, 8), id2label={0: "b", 1: "a"}).class_names == ("b", "a")
    assert Processor(size=(8, 8)).class_names == ()


@pytest.mark.parametrize(
    "ours", [SQUASHING, CROPPING, Processor(size=(8, 8), resize=(9, 10), rescale=1 / 128)]
)
def test_what_is_written_is_read_back(tmp_path, ours):
    assert read(tmp_path, **processor.to_json(ours)) == ours


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
        ({**type_("SiglipImageProcessor"), "size": 9}, "size=9 .* where nothing is cropped"),
        ({**type_("CLIPImageProcessor"), "size": [9, 9]}, r"size=\[9, 9\] .* or shortest_edge"),
        ({"do_center_crop": True}, "crop_size=null .* must be an integer, or height and width"),
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


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        "image.png",
    ],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(UserError, match="give uint8 \\(H, W, 3\\) or a PIL image"):
        SQUASHING.pixels(image)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3), np.uint8), random_image(4, 4)])
def test_one_image_in_place_of_a_list_is_refused(image):
    with pytest.raises(UserError, match="takes a list of images; put a single image into brackets"):
        SQUASHING(image)


# --- the same pixels as those of the file -------------------------------------------------------


def files_of_many_kinds():
    """Name and content of image files whose pixels need more than to be decoded."""
    noise = np.random.default_rng(7).integers(0, 256, (9, 14, 4), np.uint8)
    rgba = Image.fromarray(noise)
    sideways, grey = Image.Exif(), np.arange(0, 65536, 512, np.uint16).reshape(8, 16)
    sideways[0x0112] = 6
    palette = rgba.convert("RGB").quantize(200)
    for name, image, options in [
        ("turned.jpg", rgba.convert("RGB"), {"exif": sideways}),
        ("turned.png", rgba, {"exif": sideways}),
        ("turned.webp", rgba, {"exif": sideways, "lossless": True}),
        ("turned.tif", rgba.convert("RGB"), {"exif": sideways}),
        ("turned_palette.png", palette, {"exif": sideways, "transparency": bytes(range(200))}),
        ("palette.png", palette, {"transparency": 3}),
        ("alpha.png", rgba.convert("LA"), {}),
        ("colour.png", rgba.convert("RGB"), {"transparency": tuple(noise[0, 0, :3].tolist())}),
        ("cmyk.jpg", rgba.convert("CMYK"), {}),
        ("deep.png", Image.fromarray(grey), {}),
        ("deep.tif", Image.fromarray(grey.astype(np.int32)), {}),
    ]:
        file = io.BytesIO()
        image.save(file, Image.registered_extensions()[f".{name.split('.')[1]}"], **options)
        yield name, file.getvalue()


@pytest.mark.parametrize(("name", "data"), list(files_of_many_kinds()))
@pytest.mark.parametrize("ours", [SQUASHING, CROPPING])
def test_an_opened_image_gives_the_pixels_of_its_file(name, data, ours):
    expected = ours.pixels(images.decode(data))
    opened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(ours.pixels(opened), expected)
    np.testing.assert_array_equal(ours.pixels(opened), expected)  # nor does it change the image
    if "deep" not in name:
        np.testing.assert_array_equal(
            ours([Image.open(io.BytesIO(data))]), ours([images.decode(data)])
        )


def test_arrays_are_images_of_their_mode():
    noise = np.random.default_rng(8).integers(0, 256, (9, 14, 4), np.uint8)
    for array in (noise, noise[..., :3], noise[..., 0]):
        np.testing.assert_array_equal(
            SQUASHING.pixels(array), SQUASHING.pixels(Image.fromarray(array))
        )
    np.testing.assert_array_equal(SQUASHING.pixels(noise[..., :1]), SQUASHING.pixels(noise[..., 0]))
    assert SQUASHING.pixels(np.zeros((4, 4, 4), np.uint8)).min() == 255  # transparent: white


def test_images_that_cannot_be_used_are_errors():
    with pytest.raises(UserError, match="floating-point pixels"):
        SQUASHING.pixels(Image.new("F", (4, 4)))
    file = io.BytesIO()
    random_image(40, 60).save(file, "PNG")
    with pytest.raises(UserError, match="Not a readable image: .*truncated"):
        SQUASHING([Image.open(io.BytesIO(file.getvalue()[:2000]))])
