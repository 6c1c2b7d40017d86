"""ResNet-50 v1.5, pretrained on ImageNet-1k, fine-tuned at 224 pixels.

  python -m vitcls.main --config=configs/resnet50.py:data=tfds:cifar100 --workdir=runs/resnet50

Argument: `data=` tfds:oxford_iiit_pet, tfds:oxford_flowers102, tfds:cifar10, tfds:cifar100,
tfds:food101, tfds:imagenet2012, folder:PATH, or any other source; vitcls/recipes.py says what
depends on it. For accelerators. On a small one, set `--config.train.micro_batch` (BatchNorm
then normalises each pass by itself), or lower `--config.train.global_batch_size` and the learning
rate with it; with less than about 16 images per pass `--config.model.batch_norm=frozen` is safer.

Accuracy is not measured here, and nothing trustworthy is published for a BatchNorm ResNet-50
fine-tuned in JAX. The bar for a network of this size is BiT-M R50x1 (GroupNorm, ImageNet-21k
weights), as published in google-research/big_transfer's README for batch 128 and rate 0.001:
CIFAR-10 97.3 %, CIFAR-100 86.4 %.
The rates are those of the ViT recipes, untuned for this network.
"""

from ml_collections import ConfigDict

from vitcls import recipes


def get_config(arg: str = "") -> ConfigDict:
    """See the module."""
    return recipes.fine_tune(arg, pretrained="microsoft/resnet-50", image_size=224, resize=256)
