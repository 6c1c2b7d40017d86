"""Names of tensors: those of files, and those that modules of transformers 5 have in memory."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.pretrained.families_test import (
    CASES,
    HEAD,
    NATIVE,
    SIZES,
    WITH_MLP,
    with_config,
    write_processor,
)  # fmt: skip
from tests.torch_reference import apply, random_images, randomized, to_torch
from vitcls import pretrained
from vitcls.errors import UserError
from vitcls.pretrained import keys
from vitcls.pretrained.reading import FAMILIES

RESNET = dict(embedding_size=8, hidden_sizes=[12, 16], depths=[2, 1])
MAKE = {name: case.make for name, case in CASES.items()} | {
    "vit": lambda: with_config("ViT", HEAD),
    "vit, bare": lambda: with_config("ViT", "Model", WITH_MLP, qkv_bias=False),
    "dinov2, SwiGLU, bare": lambda: with_config("Dinov2", "Model", SIZES, use_swiglu_ffn=True),
    "resnet": lambda: with_config("ResNet", HEAD, RESNET),
    "resnet, bare": lambda: with_config("ResNet", "Model", RESNET, layer_type="basic"),
}


@pytest.fixture(scope="module", params=MAKE)
def saved(request, tmp_path_factory):
    """A torch model, and a folder `files` by `save_pretrained`, to which others are compared."""
    model = randomized(MAKE[request.param]())
    root = tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "files")
    prepare(model, root / "files")
    return model, root


def prepare(model, folder):
    if model.config.model_type == "resnet":
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    else:
        size = getattr(model.config, "vision_config", model.config).image_size
        write_processor(folder, size=(size, size))


def by_hand(model, folder):
    """As accelerate's `save_model` does, too."""
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def in_a_pickle(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def in_the_new_format(model, folder):
    model.save_pretrained(folder, save_original_format=False)


@pytest.mark.parametrize("save", [by_hand, in_a_pickle, in_the_new_format])
def test_names_in_memory_are_read_like_those_of_files(saved, save, tmp_path):
    model, root = saved
    save(model, tmp_path)
    prepare(model, tmp_path)
    expected, found = (
        pretrained.load(folder, allow_pickle=True) for folder in (root / "files", tmp_path)
    )
    assert found[0] == expected[0] and found[2] == expected[2]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize("saved", ["vit", "dinov2, SwiGLU", "dinov2 with registers"], indirect=True)
def test_logits_of_names_in_memory_equal_torch(saved, tmp_path):
    torch_model, _ = saved
    by_hand(torch_model, tmp_path)
    prepare(torch_model, tmp_path)
    model, variables, _ = pretrained.load(tmp_path)
    images = random_images(NATIVE)
    with torch.no_grad():
        expected = torch_model(pixel_values=to_torch(images)).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(apply(model, variables, images), expected, rtol=0, atol=1e-5)


def test_both_tables_are_the_way_back(saved, tmp_path):
    """Every tensor that is read, and no other, under the names that it was read by."""
    torch_model, root = saved
    in_the_new_format(torch_model, tmp_path)
    model, variables, _ = pretrained.load(root / "files")
    family = FAMILIES[model.config.family]
    for folder in (root / "files", tmp_path):
        tensors = load_file(folder / "model.safetensors")
        table = family.table_of(model.config, set(tensors))
        found = keys.dump(variables, table)
        prefix = family.prefix_of(set(tensors))
        rest = tensors.keys() - found.keys()
        assert all(family.ignored.fullmatch(name.removeprefix(prefix)) for name in rest)
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor, tensors[name].numpy(), err_msg=name)


def test_one_error_for_names_of_both_kinds(tmp_path):
    """Of the kind that most have."""
    model = randomized(MAKE["vit"]())
    by_hand(model, tmp_path)
    prepare(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = "vit.encoder.layer.0.intermediate.dense.bias"
    tensors[old] = tensors.pop("vit.layers.0.mlp.fc1.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        pretrained.load(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  1 missing: vit.layers.0.mlp.fc1.bias",
        f"  1 not known to this network: {old}",
    ]
