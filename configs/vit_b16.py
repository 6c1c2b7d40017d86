"""ViT-B/16, pretrained on ImageNet-21k, fine-tuned at 384 pixels.

  python -m vitcls.main --config=configs/vit_b16.py:data=tfds:cifar100 --workdir=runs/vit_b16

Argument: `data=` tfds:oxford_iiit_pet, tfds:oxford_flowers102, tfds:cifar10, tfds:cifar100,
tfds:food101, tfds:imagenet2012, folder:PATH, or any other source; vitcls/recipes.py says what
depends on it. For accelerators: published hours on A100s are below.
On a small accelerator, lower `--config.train.global_batch_size` and the learning rate with it.

Accuracy as published, not measured here, by google-research/vision_transformer's README
(in21k weights, 384 px, batch 512, SGD, dropout 0.0; one run each):
CIFAR-10 99.02 % and CIFAR-100 92.06 % (10 000 steps, 2.2 h each), ImageNet 84.53 % (20 000 steps,
6.5 h). With --config.train.total_steps=500: 98.59 and 89.17 %; with 1000: 98.86 and 91.15 %, and
warm-ups of 50 and 100 steps, as here. That code crops in another way: see vitcls/recipes.py.
Nothing is published for the other data sets with these weights and this recipe.
"""

from ml_collections import ConfigDict

from vitcls import recipes

# See above.
EXPECTED = recipes.published(cifar10=0.9902, cifar100=0.9206, imagenet=0.8453)


def get_config(arg: str = "") -> ConfigDict:
    """See the module."""
    return recipes.fine_tune(arg, pretrained="google/vit-base-patch16-224-in21k")
