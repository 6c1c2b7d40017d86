"""DeiT, DINOv2, CLIP and SigLIP against their references, `transformers` in torch."""

import dataclasses
import json
import re
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from tests.torch_reference import (
    apply,
    check_gradients,
    random_images,
    randomized,
    tensors,
    to_torch,
)
from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.pretrained.families import vit_fields
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.reading import FAMILIES
from vitcls.pretrained.saving import config_to_json

SIZES = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
)
WITH_MLP = SIZES | dict(intermediate_size=40)
TEXT = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9,
    max_position_embeddings=4, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
NATIVE = (32, 32)


def towers(kind: str, **changes):
    """The config of an image-text model."""
    config = getattr(transformers, f"{kind}Config")
    return config(vision_config=WITH_MLP | changes, text_config=TEXT, num_labels=5)


def with_config(kind: str, architecture: str, fields=WITH_MLP, **changes):
    config = getattr(transformers, f"{kind}Config")(**fields | changes, num_labels=5)
    return getattr(transformers, f"{kind}{architecture}")(config)


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch model, and what of its last hidden state (B, N, D) ours returns without a head."""

    make: Callable[[], torch.nn.Module]
    features: Callable[[torch.Tensor], torch.Tensor] | None = None  # None: logits
    sizes: tuple[tuple[int, int], ...] = (NATIVE,)  # of images; the first is checked backwards


def first(x):
    return x[:, 0]


def mean(x):
    return x.mean(dim=1)


def mean_of_patches(x):
    return x[:, 1:].mean(dim=1)


def first_and_mean(x):
    return torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)


HEAD = "ForImageClassification"
CASES = {
    "deit": Case(lambda: with_config("DeiT", HEAD), sizes=(NATIVE, (48, 64))),
    "deit, two heads": Case(lambda: with_config("DeiT", f"{HEAD}WithTeacher"), sizes=((24, 40),)),
    "deit, bare": Case(lambda: with_config("DeiT", "Model"), first),
    "dinov2": Case(
        lambda: with_config("Dinov2", HEAD, SIZES, mlp_ratio=2),
        sizes=(NATIVE, (24, 16), (48, 64)),
    ),
    "dinov2, bare": Case(lambda: with_config("Dinov2", "Model", SIZES), first_and_mean),
    "dinov2, SwiGLU": Case(lambda: with_config("Dinov2", HEAD, SIZES, use_swiglu_ffn=True)),
    "dinov2 with registers": Case(
        lambda: with_config("Dinov2WithRegisters", HEAD, SIZES, num_register_tokens=3),
        sizes=(NATIVE, (24, 16), (48, 64)),
    ),
    "siglip": Case(
        lambda: transformers.SiglipForImageClassification(towers("Siglip")),
        sizes=(NATIVE, (48, 64)),
    ),
    # As siglip-so400m-patch14-384: two columns and two rows of pixels are in no patch.
    "siglip, not whole patches": Case(
        lambda: transformers.SiglipForImageClassification(towers("Siglip", image_size=34)),
        sizes=((34, 34), (24, 40)),
    ),
    "siglip, with text": Case(lambda: transformers.SiglipModel(towers("Siglip")), mean),
    "siglip, bare": Case(lambda: with_config("SiglipVision", "Model"), mean),
    "clip": Case(
        lambda: transformers.CLIPForImageClassification(towers("CLIP")),
        sizes=(NATIVE, (48, 64)),
    ),
    "clip, with text": Case(
        lambda: transformers.CLIPModel(towers("CLIP", hidden_act="gelu")), mean_of_patches
    ),
    "clip, bare": Case(lambda: with_config("CLIPVision", "Model"), mean_of_patches),
    "clip, projected": Case(
        lambda: with_config("CLIPVision", "ModelWithProjection"), mean_of_patches
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(case, torch model, folder that `save_pretrained` wrote)."""
    model = randomized(CASES[request.param].make())
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    write_processor(folder, size=CASES[request.param].sizes[0])
    return CASES[request.param], model, folder


def write_processor(folder, *, size):
    size = dict(zip(("height", "width"), size, strict=True))
    content = {"image_processor_type": "ViTImageProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def torch_outputs(model, features, images):
    """What ours computes from images (B, H, W, 3)."""
    arguments = {} if "dinov2" in model.config.model_type else {"interpolate_pos_encoding": True}
    network = model if features is None else getattr(model, "vision_model", model)
    out = network(pixel_values=to_torch(images), **arguments)
    return out.logits if features is None else features(out.last_hidden_state)


def test_outputs_equal_torch(case):
    case, torch_model, folder = case
    for size in case.sizes:
        images = random_images(size)
        model, variables, _ = pretrained.load(folder, image_size=size)
        with torch.no_grad():
            expected = torch_outputs(torch_model, case.features, images).numpy()
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(apply(model, variables, images), expected, rtol=0, atol=1e-4)


ONE_OF_EACH = ["deit, two heads", "dinov2 with registers", "siglip", "clip"]


@pytest.mark.parametrize("case", ONE_OF_EACH, indirect=True)
def test_gradients_through_a_random_head_equal_torch(case):
    case, torch_model, folder = case
    model, variables, _ = pretrained.load(folder, image_size=case.sizes[0])
    check_gradients(
        model,
        variables,
        random_images(case.sizes[0]),
        torch_model=torch_model,
        torch_outputs=lambda images: torch_outputs(torch_model, case.features, images),
        folder=folder,
    )


# Beside classification: pooling by attention, pretraining, other towers.
NOT_SAVED = re.compile(
    r".*pooler\..*|(vision_model\.)?head\..*|text_.*|visual_projection.*|logit_.*"
)
NOT_KEPT = re.compile(r".*(mask_token|post_layernorm\.(weight|bias))")  # SigLIP's norm is kept


def test_loading_and_saving_is_the_identity_and_transformers_loads_it(case, tmp_path):
    case, torch_model, folder = case
    pretrained.save(tmp_path / "out", *pretrained.load(folder))
    before, after = tensors(folder), tensors(tmp_path / "out")
    if case.features is not None:  # saved as the tower alone
        before = {name.removeprefix("vision_model."): tensor for name, tensor in before.items()}
    assert after.keys() == {name for name in before if not NOT_SAVED.fullmatch(name)}
    is_siglip = "siglip" in torch_model.config.model_type
    for name, tensor in after.items():
        if is_siglip or not NOT_KEPT.fullmatch(name):
            np.testing.assert_array_equal(tensor, before[name], err_msg=name)

    auto = transformers.AutoModel
    if case.features is None:
        auto = transformers.AutoModelForImageClassification
    theirs, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"] | info["mismatched_keys"]
    assert all("pooler" in name for name in info["missing_keys"])
    images = random_images(case.sizes[0])
    with torch.no_grad():
        expected = torch_outputs(torch_model, case.features, images)
        found = torch_outputs(theirs, case.features, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_names_of_older_transformers_are_read(tmp_path):
    """They had the tower's name before a bare one's tensors, and the positions' indices."""
    torch_model = randomized(CASES["clip, bare"].make())
    torch_model.save_pretrained(tmp_path)
    write_processor(tmp_path, size=NATIVE)
    _, expected, _ = pretrained.load(tmp_path)
    old = {f"vision_model.{name}": tensor for name, tensor in tensors(tmp_path).items()}
    old["vision_model.embeddings.position_ids"] = np.arange(17)[np.newaxis]
    save_file(old, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path)[1], expected)


# Preprocessing


def test_preprocessing_inside_that_of_an_image_text_model_is_read(tmp_path):
    """As `CLIPProcessor.save_pretrained` of transformers 5 writes it."""
    transformers.CLIPForImageClassification(towers("CLIP")).save_pretrained(tmp_path)
    theirs = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32)
    content = {"image_processor": json.loads(theirs.to_json_string()), "processor_class": "x"}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    processor = pretrained.load(tmp_path)[2]
    assert (processor.resize, processor.size) == (40, (32, 32))
    files = pretrained.find(tmp_path)
    assert set(files.sha256()) == {"config.json", "processor_config.json", "model.safetensors"}
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    found = theirs(image)["pixel_values"][0]
    np.testing.assert_allclose(processor([image])[0], np.moveaxis(found, 0, -1), atol=2e-6)


# For the other families transformers has no default.
@pytest.mark.parametrize("model_type", ["clip", "deit", "dinov2", "resnet", "siglip", "vit"])
def test_a_file_without_a_type_means_the_familys_own_processor(tmp_path, model_type):
    content = {"model_type": model_type, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs).__name__ == f"{FAMILIES[model_type].processor_type}Pil"
    _, prepared = pretrained.read_json(tmp_path, tensors=None)
    assert prepared.mean == pytest.approx(theirs.image_mean, abs=0)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_is_loaded_for_the_size_that_its_preprocessing_makes(tmp_path, kind):
    """As its checkpoints, whose positions are stored for 518 pixels and whose images have 224."""
    torch_model = randomized(with_config(kind, HEAD, SIZES, image_size=56))
    torch_model.save_pretrained(tmp_path / "in")
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 24, "width": 24}
    ).save_pretrained(tmp_path / "in")
    image = np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)

    model, variables, processor = pretrained.load(tmp_path / "in")
    assert model.config.image_size == processor.size == (24, 24)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "in", backend="pil")
    with torch.no_grad():
        expected = torch_model(**theirs(image, return_tensors="pt")).logits
    found = apply(model, variables, processor([image]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

    native = pretrained.load(tmp_path / "in", image_size=(56, 56))
    assert (native[2].size, native[2].resize) == ((56, 56), round(40 * 56 / 24))
    pretrained.save(tmp_path / "out", *native)
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    name = next(name for name in before if "position_embeddings" in name)
    np.testing.assert_array_equal(after[name], before[name])


# Configs


def read(model_type, num_classes=4, **fields):
    fields = JsonFields(fields | {"model_type": model_type}, path="config.json")
    return FAMILIES[model_type].read_config(fields, num_classes, None)


@pytest.mark.parametrize(
    ("model_type", "theirs"),
    [
        ("deit", transformers.DeiTConfig()),
        ("vit_mae", transformers.ViTMAEConfig()),
        ("dinov2", transformers.Dinov2Config()),
        ("dinov2_with_registers", transformers.Dinov2WithRegistersConfig()),
        ("siglip", transformers.SiglipConfig().vision_config),
        ("siglip_vision_model", transformers.SiglipVisionConfig()),
        ("clip", transformers.CLIPConfig().vision_config),
        ("clip_vision_model", transformers.CLIPVisionConfig()),
    ],
)
def test_absent_fields_mean_what_they_mean_in_transformers(model_type, theirs):
    config = read(model_type)
    assert config.image_size == (theirs.image_size,) * 2
    assert config.patch_size == (theirs.patch_size,) * 2
    assert config.width == theirs.hidden_size
    assert config.depth == theirs.num_hidden_layers
    assert config.num_heads == theirs.num_attention_heads
    assert config.epsilon == theirs.layer_norm_eps
    assert vit_fields.ACTIVATIONS[theirs.hidden_act] == config.activation
    assert config.qkv_bias == getattr(theirs, "qkv_bias", True)
    if "dinov2" in model_type:
        assert config.mlp_dim == theirs.hidden_size * theirs.mlp_ratio
        assert (config.mlp == "swiglu") == theirs.use_swiglu_ffn
        assert config.num_registers == getattr(theirs, "num_register_tokens", 0)
    else:
        assert config.mlp_dim == theirs.intermediate_size


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "resnet"])
def test_config_to_json_is_read_back(model_type, num_classes):
    config = read(model_type, num_classes)
    assert (config.num_classes, config.image_size) == (num_classes, (224, 224))
    content = config_to_json(config)
    assert read(num_classes=num_classes, **content) == config


@pytest.mark.parametrize("model_type", ["dinov2", "siglip", "clip"])
def test_formats_of_square_images_refuse_others(model_type):
    config = read(model_type).resized((224, 448) if model_type != "clip" else (224, 256))
    with pytest.raises(UserError, match="format has square images only, not .*; choose a square"):
        config_to_json(config)
    with pytest.raises(UserError, match=r"image size, such as data.image_size=\(224, 224\)"):
        pretrained.check_format(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_networks_that_can_be_saved_pass_the_check_at_the_start(model_type):
    pretrained.check_format(read(model_type))


def test_mlps_that_are_no_multiple_of_the_width_are_not_written():
    config = dataclasses.replace(read("dinov2"), mlp_dim=1000)
    with pytest.raises(UserError, match="'dinov2' format has MLPs whose width is a multiple"):
        config_to_json(config)
