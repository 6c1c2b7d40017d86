"""Writes augment.npz: what timm and torchvision make of given and of random augmentation settings.

Neither is needed by vitcls or its tests. The file was made with Python 3.11.7, timm 1.0.31,
torchvision 0.28.0, torch 2.13.0, numpy 2.4.6 and Pillow 13.0.0, by

    pip install --no-deps --target FOLDER timm==1.0.31 torchvision==0.28.0
    PYTHONPATH=FOLDER python tests/golden/make_augment.py

in an environment that has the others. It holds

- `levels` (L,), and `timm/OPERATION` (L,): the arguments of RandAugment's operations at these
  magnitudes, with the sign that timm's `random.random() > 0.5` does not negate; shifts are shares
  of the side.
- `timm/degrees` (Q,): quantiles, at `quantiles`, of how far magnitude 9 rotates, either way.
- `torchvision/OPERATION` (31,): the magnitudes of TrivialAugmentWide.
- `cutmix` (N, 7): share, centre y, centre x, then timm's box: top, bottom, left, right, for images
  of SIZE.
- `cutmix_areas` (Q,) and `erased_areas`, `erased_aspects` (Q,): quantiles, at `quantiles`, of the
  share of the area that timm's random boxes have, and of their height / width; CutMix' alpha is 1.
- `num_erased` (): how many of `num_images` images were erased with probability 1/4.
"""

import random
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from timm.data import auto_augment, mixup, random_erasing
from torchvision.transforms.autoaugment import TrivialAugmentWide

SIZE = (60, 80)
NUM_DRAWS = 10_000
OPERATIONS = {
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
TRIVIAL = {
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
}


def main() -> None:
    """Writes the file beside this script."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    levels = np.concatenate([np.linspace(0, 10, 21), [8.97, 9.4, 9.9]])
    arrays = {"levels": levels, "quantiles": np.linspace(0.05, 0.95, 10)}
    with mock.patch.object(auto_augment.random, "random", return_value=0.0):
        for name, theirs in OPERATIONS.items():
            to_argument = auto_augment.LEVEL_TO_ARG[theirs]
            arrays[f"timm/{name}"] = np.array([to_argument(level, {})[0] for level in levels])
    arrays["timm/degrees"] = np.quantile(np.abs(drawn_degrees()), arrays["quantiles"])
    space = TrivialAugmentWide()._augmentation_space(31)
    for name, theirs in TRIVIAL.items():
        arrays[f"torchvision/{name}"] = space[theirs][0].numpy()
    arrays |= cutmix_boxes(arrays["quantiles"]) | erased_boxes(arrays["quantiles"])
    np.savez_compressed(Path(__file__).with_name("augment.npz"), **arrays)


def drawn_degrees() -> list[float]:
    """Degrees of the rotations that RandAugment's m9-mstd0.5 asks for."""
    degrees = []
    operation = auto_augment.AugmentOp(
        "Rotate", prob=1.0, magnitude=9, hparams=dict(magnitude_std=0.5)
    )
    operation.aug_fn = lambda image, angle, **_: degrees.append(angle)
    for _ in range(NUM_DRAWS):
        operation(None)
    return degrees


def cutmix_boxes(quantiles: np.ndarray) -> dict[str, np.ndarray]:
    """Boxes at given shares and centres, and the areas of random ones."""
    rows = []
    for share in (0.0, 0.02, 0.3, 0.55, 0.9, 0.999):
        for y, x in [(0, 0), (59, 79), (30, 40), (7, 66), (44, 3)]:
            with mock.patch.object(np.random, "randint", mock.Mock(side_effect=[y, x])):
                rows.append([share, y, x, *mixup.rand_bbox(SIZE, share)])
    shares = [mixup.cutmix_bbox_and_lam(SIZE, np.random.beta(1, 1))[1] for _ in range(NUM_DRAWS)]
    return {"cutmix": np.array(rows), "cutmix_areas": np.quantile(1 - np.array(shares), quantiles)}


def erased_boxes(quantiles: np.ndarray) -> dict[str, np.ndarray]:
    """Areas, and heights over widths, of the boxes that become 0 in images of ones."""
    eraser = random_erasing.RandomErasing(probability=0.25, device="cpu")
    areas, aspects = [], []
    for _ in range(NUM_DRAWS):
        erased = eraser(torch.ones(1, *SIZE))[0] == 0
        if erased.any():
            height, width = erased.any(1).sum().item(), erased.any(0).sum().item()
            areas.append(height * width / (SIZE[0] * SIZE[1]))
            aspects.append(height / width)
    return {
        "num_images": np.array(NUM_DRAWS),
        "num_erased": np.array(len(areas)),
        "erased_areas": np.quantile(areas, quantiles),
        "erased_aspects": np.quantile(aspects, quantiles),
    }


if __name__ == "__main__":
    main()
