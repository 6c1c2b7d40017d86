"""ViT-S/16, pretrained on ImageNet, fine-tuned at 384 pixels.

  python -m vitcls.main --config=configs/vit_s16.py:data=tfds:cifar100 --workdir=runs/vit_s16

Argument: `data=` tfds:oxford_iiit_pet, tfds:oxford_flowers102, tfds:cifar10, tfds:cifar100,
tfds:food101, tfds:imagenet2012, folder:PATH, or any other source; vitcls/recipes.py says what
depends on it. For accelerators: no hours are published.
On a small accelerator, lower `--config.train.global_batch_size` and the learning rate with it.

Accuracy as published, not measured here: google-research/vision_transformer's README has 83.73 % on
ImageNet for AugReg S/16 from in21k weights (384 px, 20 000 steps, lr 0.03; one run). The checkpoint
here is another one, in Hugging Face format and already fine-tuned on ImageNet. Nothing is published
for it with this recipe. That README's code crops in another way: see vitcls/recipes.py.
"""

from ml_collections import ConfigDict

from vitcls import recipes


def get_config(arg: str = "") -> ConfigDict:
    """See the module."""
    return recipes.fine_tune(arg, pretrained="WinKawaks/vit-small-patch16-224")
