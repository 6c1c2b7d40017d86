"""Pretrains the quick start's checkpoint: a small ViT on rendered letters and digits.

  make fonts
  pip install -r requirements-tfds.txt
  python -m vitcls.main --config=configs/pretrain_glyphs.py --workdir=runs/pretrain_glyphs

The images are rendered from free fonts when the data set `glyphs` is prepared (see
vitcls/data/glyphs), in the format of the digits. They include no handwritten digits.
"""

from ml_collections import ConfigDict

from vitcls.config import default_config


def get_config() -> ConfigDict:
    """See the module."""
    config = default_config()
    config.data.source = "glyphs"
    config.data.image_size = (24, 24)
    config.data.holdout = 0.02
    config.data.crop_scale = (0.6, 1.0)
    config.augment.flip = False
    config.model.arch = "vit_nano4"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.05
    config.optim.warmup_steps = 200
    config.loss.label_smoothing = 0.1
    config.train.global_batch_size = 128
    config.train.total_steps = 2500
    config.eval.every_steps = 500
    config.eval.batch_size = 256
    config.log.every_steps = 50
    return config
