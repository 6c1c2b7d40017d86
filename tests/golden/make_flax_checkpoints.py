"""Writes the Flax checkpoints of this folder, and what the Flax classes compute from them.

Run it by make_flax_checkpoints.sh, which says why it needs an environment of its own. The files
here were made with Python 3.11.7, transformers 4.57.6, jax and jaxlib 0.4.13, flax 0.7.0,
numpy 1.26.4 and msgpack 1.2.4, on an x86-64 CPU; a second run gives the same bytes.

Each folder has what `save_pretrained` of a network and of its image processor writes, and
reference.npz: "images" float32 (B, H, W, 3), as the network takes them, and "outputs" float32: its
logits (B, K), or (B, D) without a head: for a ViT the class token after the last LayerNorm, for a
CLIP, whose Flax classes have no head, the mean of the patches, for a ResNet the pooled features.
"""

import os
import shutil
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ConvNextImageProcessor,
    Dinov2Config,
    FlaxCLIPModel,
    FlaxCLIPVisionModel,
    FlaxDinov2ForImageClassification,
    FlaxResNetForImageClassification,
    FlaxResNetModel,
    FlaxViTForImageClassification,
    FlaxViTModel,
    PretrainedConfig,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
)

HERE = Path(__file__).parent
BATCH, NUM_CLASSES = 3, 5
VIT = dict(
    image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=24, num_labels=NUM_CLASSES,
)  # fmt: skip
TEXT = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9,
    max_position_embeddings=4, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
RESNET = dict(embedding_size=8, hidden_sizes=[12, 16], depths=[2, 1], num_labels=NUM_CLASSES)
# Folder -> network, image processor and the side of its images.
CASES = {
    "flax_vit": (FlaxViTForImageClassification, ViTConfig(**VIT), 16),
    "flax_vit_without_head": (FlaxViTModel, ViTConfig(**VIT), 16),
    "flax_dinov2": (FlaxDinov2ForImageClassification, Dinov2Config(**VIT, use_swiglu_ffn=True), 16),
    "flax_clip": (FlaxCLIPVisionModel, CLIPVisionConfig(**VIT), 16),
    "flax_clip_with_text": (
        FlaxCLIPModel,
        CLIPConfig(vision_config=VIT, text_config=TEXT, projection_dim=8),
        16,
    ),
    "flax_resnet": (FlaxResNetForImageClassification, ResNetConfig(**RESNET), 32),
    # Of basic layers, whose list of convolutions is named in another way.
    "flax_resnet_without_head": (FlaxResNetModel, ResNetConfig(layer_type="basic", **RESNET), 32),
}


def write(name: str, kind: type, config: PretrainedConfig, side: int) -> None:
    """Writes one folder; every variable is random, so that none can be left out unseen."""
    rng = np.random.default_rng(sum(name.encode()))
    shape = (1, side, side, 3)
    # With a text tower the shapes of both are asked for.
    has_text = isinstance(config, CLIPConfig)
    model = kind(config, input_shape=((1, 4), shape) if has_text else shape, seed=0)
    params = {}
    for path, leaf in sorted(flatten_dict(model.params).items()):
        noise = np.asarray(rng.normal(size=leaf.shape), np.float32)
        # Vectors vary about 0 or 1; kernels keep the size of what passes through them.
        is_kernel = leaf.ndim > 1
        params[path] = noise / np.prod(leaf.shape[:-1]) ** 0.5 if is_kernel else leaf + 0.2 * noise
        assert path[-1] != "var" or params[path].min() > 0
    model.params = unflatten_dict(params)
    images = rng.normal(size=(BATCH, side, side, 3)).astype(np.float32)
    with jax.default_matmul_precision("float32"):  # the highest there is
        if has_text:  # which calling the whole model would ask for, too
            found = model.module.bind({"params": model.params}).vision_model(images)
        else:
            found = model(images.transpose(0, 3, 1, 2))
    if "CLIP" in kind.__name__:
        outputs = found.last_hidden_state[:, 1:].mean(axis=1)
    elif "logits" in found:
        outputs = found.logits
    elif isinstance(config, ViTConfig):
        outputs = found.last_hidden_state[:, 0]  # its own pooler is no part of our network
    else:
        outputs = found.pooler_output[:, :, 0, 0]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if "CLIP" in kind.__name__:
        processor = CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    elif not isinstance(config, ResNetConfig):
        processor = ViTImageProcessor(size={"height": side, "width": side})
    else:
        processor = ConvNextImageProcessor(size={"shortest_edge": side})
    processor.save_pretrained(folder)
    np.savez_compressed(folder / "reference.npz", images=images, outputs=np.asarray(outputs))


if __name__ == "__main__":
    for name, case in CASES.items():
        write(name, *case)
