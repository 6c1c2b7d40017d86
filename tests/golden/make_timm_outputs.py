"""Writes what timm computes from weights that the tests make again: see timm_weights.py.

Run it by make_timm_outputs.sh, in an environment of its own. The files here were made with Python
3.11.7, timm 1.0.31, torch 2.13.0 (CPU), torchvision 0.28.0, numpy 2.4.6 and Pillow 13.0.0, on an
x86-64 CPU; a second run gives the same bytes.

`timm/NAME.npz`, of a network: "config" and "tensors", JSON: its config.json as timm's `save_for_hf`
writes it, and the shapes of its state dict by name; "outputs" float32 (2, K), logits or, without a
head, features of images of its own size; "resized" of images of the size in "other_size".

`timm/architectures.json`: every name that is read -> what decides its computation, and a digest of
the names and shapes of its tensors.

`timm/pixels.npz`: "CASE HxW" uint8 (3, h, w), pictures of that size through the transform of the
config in "CASE"; "normalised" float32, the last of them to the end; "resize" int (N, 3): image
size, 1000 crop_pct, shorter side.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # PyPI's wheel wants torch for CUDA; its operators are in no transform
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from timm_weights import make_images, make_picture, make_tensor

FOLDER = Path(__file__).parent / "timm"
# name of the file -> architecture, its arguments, another image size
NETWORKS = {
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", dict(num_classes=10), (160, 256)),
    "vit_tiny_patch16_384_without_head": ("vit_tiny_patch16_384", dict(num_classes=0), (96, 80)),
    "vit_small_patch32_224": ("vit_small_patch32_224", dict(num_classes=10), (320, 160)),
    "deit_tiny_distilled_patch16_224": (
        "deit_tiny_distilled_patch16_224", dict(num_classes=10), (256, 192),
    ),
    "resnet18": ("resnet18", dict(num_classes=10), (97, 64)),
    "resnet50": ("resnet50", dict(num_classes=10), (97, 64)),
}  # fmt: skip
LABELS = {
    "label_names": [f"n{index}" for index in range(10)],
    "label_descriptions": {f"n{index}": f"class {index}" for index in range(1, 10)},
}
ARCHITECTURES = [
    "vit_tiny_patch16_224", "vit_tiny_patch16_384",
    "vit_small_patch8_224", "vit_small_patch16_224", "vit_small_patch16_384",
    "vit_small_patch32_224", "vit_small_patch32_384",
    "vit_base_patch8_224", "vit_base_patch16_224", "vit_base_patch16_384",
    "vit_base_patch32_224", "vit_base_patch32_384",
    "vit_large_patch14_224", "vit_large_patch16_224", "vit_large_patch16_384",
    "vit_large_patch32_224", "vit_large_patch32_384", "vit_huge_patch14_224",
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224", "deit_base_distilled_patch16_384",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
]  # fmt: skip
NORMAL = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TRANSFORMS = {
    "center": dict(input_size=(3, 32, 32), crop_pct=0.9, interpolation="bicubic", **NORMAL),
    "bilinear": dict(input_size=(3, 40, 40), crop_pct=0.875, interpolation="bilinear", **NORMAL),
    "squash": dict(
        input_size=(3, 24, 36), crop_pct=0.75, interpolation="bicubic", crop_mode="squash", **NORMAL
    ),
    "whole": dict(
        input_size=(3, 32, 32), crop_pct=1.0, interpolation="bilinear", crop_mode="squash", **NORMAL
    ),
}
# With "center" the longer side becomes 35 to 54: margins of every kind.
PICTURES = [(90, 60), (50, 50), (64, 81), (83, 64), (64, 85), (87, 64), (20, 30)]
CROPS = [(224, 0.875), (224, 0.9), (224, 0.95), (160, 0.95), (176, 0.875), (384, 1.0), (224, 0.96)]


def tensors_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the state dict by name, without the counts of BatchNorm."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@torch.no_grad()
def run(model: torch.nn.Module, image_size: tuple[int, int]) -> np.ndarray:
    images = torch.from_numpy(make_images(image_size)).permute(0, 3, 1, 2)
    return model.eval()(images).numpy()


def write_network(file: str, name: str, kwargs: dict, other_size: tuple[int, int]) -> None:
    model = timm.create_model(name, **kwargs)
    tensors = tensors_of(model)
    weights = {key: torch.from_numpy(make_tensor(key, shape)) for key, shape in tensors.items()}
    model.load_state_dict(weights, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder, LABELS if kwargs["num_classes"] else {})
        config = Path(folder, "config.json").read_text()
    outputs = run(model, tuple(json.loads(config)["pretrained_cfg"]["input_size"][1:]))
    if not name.startswith("resnet"):
        model = timm.create_model(name, img_size=other_size, **kwargs)
        weights = checkpoint_filter_fn(weights, model)
    model.load_state_dict(weights, strict=False)
    np.savez_compressed(
        FOLDER / f"{file}.npz",
        config=config,
        tensors=json.dumps(tensors),
        outputs=outputs,
        other_size=other_size,
        resized=run(model, other_size),
    )


def describe(name: str) -> dict:
    with torch.device("meta"):
        model = timm.create_model(name)
    lines = "".join(f"{key} {shape}\n" for key, shape in sorted(tensors_of(model).items()))
    found = {"tensors": hashlib.sha256(lines.encode()).hexdigest()}
    cfg = model.pretrained_cfg
    found |= {"input_size": cfg["input_size"], "num_classes": cfg["num_classes"]}
    if not name.startswith("resnet"):
        found |= {"num_heads": model.blocks[0].attn.num_heads, "epsilon": model.norm.eps}
        found |= {"activation": type(model.blocks[0].mlp.act).__name__}
    return found


def write_pixels() -> None:
    arrays = {}
    for case, kwargs in TRANSFORMS.items():
        arrays[case] = json.dumps(kwargs)
        for size in PICTURES:
            image = Image.fromarray(make_picture(*size))
            pixels = create_transform(**kwargs, normalize=False)(image)
            arrays["{} {}x{}".format(case, *size)] = pixels.numpy()
    arrays["normalised"] = create_transform(**kwargs)(image).numpy()
    sides = [
        (size, round(1000 * crop_pct),
         create_transform((3, size, size), crop_pct=crop_pct).transforms[0].size)
        for size, crop_pct in CROPS
    ]  # fmt: skip
    np.savez_compressed(FOLDER / "pixels.npz", resize=np.array(sides), **arrays)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    described = {name: describe(name) for name in ARCHITECTURES}
    (FOLDER / "architectures.json").write_text(json.dumps(described, indent=1) + "\n")
    write_pixels()
    for file, case in NETWORKS.items():
        write_network(file, *case)
