"""ViT-B/32, pretrained on ImageNet-21k, fine-tuned at 384 pixels.

  python -m vitcls.main --config=configs/vit_b32.py:data=tfds:cifar100 --workdir=runs/vit_b32

Argument: `data=` tfds:oxford_iiit_pet, tfds:oxford_flowers102, tfds:cifar10, tfds:cifar100,
tfds:food101, tfds:imagenet2012, folder:PATH, or any other source; vitcls/recipes.py says what
depends on it. For accelerators: published hours on A100s are below.
On a small accelerator, lower `--config.train.global_batch_size` and the learning rate with it.

Accuracy as published, not measured here, by google-research/vision_transformer's README
(in21k weights, 384 px, batch 512, SGD, dropout 0.0; one run each):
CIFAR-10 98.88 % and CIFAR-100 92.31 % (10 000 steps, 0.8 h each), ImageNet 81.66 % (20 000 steps,
3.3 h). The header of big_vision's configs/transfer.py has Pets 93.78 % (93.62-94.00 in 5 runs) and
Flowers 99.43 % (99.42-99.45), but from the AugReg weights, which are not these. The README's code
crops in another way: see vitcls/recipes.py.
"""

from ml_collections import ConfigDict

from vitcls import recipes

# See above.
EXPECTED = recipes.published(cifar10=0.9888, cifar100=0.9231, imagenet=0.8166)


def get_config(arg: str = "") -> ConfigDict:
    """See the module."""
    return recipes.fine_tune(arg, pretrained="google/vit-base-patch32-224-in21k")
