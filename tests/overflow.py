"""A checkpoint whose weights are finite and whose answers are not."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

# What every command says of it.
MESSAGE = r"answers to {} images are not finite: {}.*\. Its weights are finite but overflow"


def overflowing(checkpoint: Path, folder: Path) -> Path:
    """Copies a ViT with a head to `folder`; its features are then beyond float32."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.layernorm.weight"] = np.full(
        tensors["vit.layernorm.weight"].shape, 3e38, np.float32
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
