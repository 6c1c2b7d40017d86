"""ViT-L/16, pretrained on ImageNet-21k, fine-tuned at 384 pixels.

  python -m vitcls.main --config=configs/vit_l16.py:data=tfds:cifar100 --workdir=runs/vit_l16

Argument: `data=` tfds:oxford_iiit_pet, tfds:oxford_flowers102, tfds:cifar10, tfds:cifar100,
tfds:food101, tfds:imagenet2012, folder:PATH, or any other source; vitcls/recipes.py says what
depends on it. For accelerators: published hours on A100s are below.
On a small accelerator, lower `--config.train.global_batch_size` and the learning rate with it.

Accuracy as published, not measured here, by google-research/vision_transformer's README
(in21k weights, 384 px, batch 512, SGD, dropout 0.0; one run each):
CIFAR-10 99.13 % (10 000 steps, 6.9 h), CIFAR-100 92.91 % (7.1 h), ImageNet 84.47 % (20 000 steps,
16.8 h). Nothing is published for the other data sets with these weights and this recipe.
"""

from ml_collections import ConfigDict

from vitcls import recipes

# See above.
EXPECTED = recipes.published(cifar10=0.9913, cifar100=0.9291, imagenet=0.8447)


def get_config(arg: str = "") -> ConfigDict:
    """See the module."""
    return recipes.fine_tune(arg, pretrained="google/vit-large-patch16-224-in21k")
