"""Writes the Flax checkpoints of this folder, and what the Flax classes compute from them.

Run it by make_flax_checkpoints.sh, which says why it needs an environment of its own. The files
here were made with Python 3.11.7, transformers 4.57.6, jax and jaxlib 0.4.13, flax 0.7.0,
numpy 1.26.4 and msgpack 1.2.4, on an x86-64 CPU; a second run gives the same bytes.

Each folder has what `save_pretrained` of a network and of its image processor writes, and
reference.npz: "images" float32 (B, H, W, 3), as the network takes them, and "outputs" float32: its
logits (B, K), or (B, D) without a head: for a ViT the class token after the last LayerNorm, for a
ResNet the pooled features.
"""

import os
import shutil
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import (
    ConvNextImageProcessor,
    FlaxResNetForImageClassification,
    FlaxResNetModel,
    FlaxViTForImageClassification,
    FlaxViTModel,
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
RESNET = dict(embedding_size=8, hidden_sizes=[12, 16], depths=[2, 1], num_labels=NUM_CLASSES)
# Folder -> network, image processor and the side of its images.
CASES = {
    "flax_vit": (FlaxViTForImageClassification, ViTConfig(**VIT), 16),
    "flax_vit_without_head": (FlaxViTModel, ViTConfig(**VIT), 16),
    "flax_resnet": (FlaxResNetForImageClassification, ResNetConfig(**RESNET), 32),
    # Of basic layers, whose list of convolutions is named in another way.
    "flax_resnet_without_head": (FlaxResNetModel, ResNetConfig(layer_type="basic", **RESNET), 32),
}


def write(name: str, kind: type, config: ViTConfig | ResNetConfig, side: int) -> None:
    """Writes one folder; every variable is random, so that none can be left out unseen."""
    rng = np.random.default_rng(sum(name.encode()))
    model = kind(config, input_shape=(1, side, side, 3), seed=0)
    params = {}
    for path, leaf in sorted(flatten_dict(model.params).items()):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        # Vectors vary about 0 or 1; kernels keep the size of what passes through them.
        is_vector = leaf.ndim == 1
        params[path] = leaf + 0.2 * noise if is_vector else noise / np.prod(leaf.shape[:-1]) ** 0.5
        assert path[-1] != "var" or params[path].min() > 0
    model.params = unflatten_dict(params)
    images = rng.normal(size=(BATCH, side, side, 3)).astype(np.float32)
    with jax.default_matmul_precision("float32"):  # the highest there is
        found = model(images.transpose(0, 3, 1, 2))
    if "logits" in found:
        outputs = found.logits
    elif isinstance(config, ViTConfig):
        outputs = found.last_hidden_state[:, 0]  # its own pooler is no part of our network
    else:
        outputs = found.pooler_output[:, :, 0, 0]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if isinstance(config, ViTConfig):
        processor = ViTImageProcessor(size={"height": side, "width": side})
    else:
        processor = ConvNextImageProcessor(size={"shortest_edge": side})
    processor.save_pretrained(folder)
    np.savez_compressed(folder / "reference.npz", images=images, outputs=np.asarray(outputs))


if __name__ == "__main__":
    for name, case in CASES.items():
        write(name, *case)
