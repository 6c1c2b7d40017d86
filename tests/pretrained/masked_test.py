"""Checkpoints of masked images are read as encoders, against transformers in torch."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.pretrained.families_test import NATIVE, WITH_MLP, write_processor
from tests.pretrained.names_test import by_hand
from tests.torch_reference import apply, random_images, randomized, to_torch
from vitcls import pretrained
from vitcls.errors import UserError

# MAE masks patches in evaluation, too: here it sees them all, shuffled.
MAE = dict(
    mask_ratio=0.0, decoder_hidden_size=12, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=8,
)  # fmt: skip
KINDS = {
    "vit": (transformers.ViTForMaskedImageModeling, transformers.ViTConfig(**WITH_MLP)),
    "deit": (transformers.DeiTForMaskedImageModeling, transformers.DeiTConfig(**WITH_MLP)),
    "vit_mae": (transformers.ViTMAEForPreTraining, transformers.ViTMAEConfig(**WITH_MLP, **MAE)),
    "vit_mae, bare": (transformers.ViTMAEModel, transformers.ViTMAEConfig(**WITH_MLP, **MAE)),
}


def in_files(model, folder):
    model.save_pretrained(folder)


@pytest.fixture(params=KINDS)
def torch_model(request) -> torch.nn.Module:
    kind, config = KINDS[request.param]
    return randomized(kind(config))


@pytest.mark.parametrize("save", [in_files, by_hand])
def test_features_are_those_of_the_encoder(torch_model, tmp_path, save):
    save(torch_model, tmp_path)
    write_processor(tmp_path, size=NATIVE)
    for size in (NATIVE, (48, 48)):
        model, variables, _ = pretrained.load(tmp_path, image_size=size)
        images = random_images(size)
        with torch.no_grad():
            out = torch_model.base_model(to_torch(images), interpolate_pos_encoding=True)
            expected = out.last_hidden_state[:, 0].numpy()
        assert np.abs(expected).max() > 1 and not model.config.num_classes
        np.testing.assert_allclose(apply(model, variables, images), expected, rtol=0, atol=1e-5)


def test_a_new_head_is_saved_as_a_classifier_that_transformers_reads(torch_model, tmp_path):
    torch_model.save_pretrained(tmp_path / "in")
    write_processor(tmp_path / "in", size=NATIVE)
    model, variables, processor = pretrained.load(tmp_path / "in", num_classes=3)
    rng = np.random.default_rng(0)
    variables["params"]["classifier"]["kernel"] = rng.normal(size=(24, 3)).astype(np.float32)
    names = {0: "ant", 1: "bee", 2: "cat"}
    processor = dataclasses.replace(processor, id2label=names)
    pretrained.save(tmp_path / "out", model, variables, processor)
    theirs, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["unexpected_keys"] | info["mismatched_keys"] | info["missing_keys"]
    images = random_images(NATIVE)
    with torch.no_grad():
        expected = theirs(pixel_values=to_torch(images)).logits.numpy()
    np.testing.assert_allclose(apply(model, variables, images), expected, rtol=0, atol=1e-5)


def test_other_tensors_are_still_refused(tmp_path):
    kind, config = KINDS["vit_mae"]
    model = randomized(kind(config))
    model.save_pretrained(tmp_path)
    write_processor(tmp_path, size=NATIVE)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vit.fc_norm.weight"] = tensors["vit.layernorm.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 not known to this network: vit.fc_norm.weight$"):
        pretrained.load(tmp_path)
