"""A run of seconds with everything random switched on, and a save every few steps."""

from ml_collections import ConfigDict

from vitcls.config.fields import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.source = "digits"
    config.data.image_size = (8, 8)
    config.data.num_threads = 2
    config.model.arch = "vit_mu4"
    config.model.dropout = 0.1
    config.augment.mixup = 0.2
    config.optim.lr = 1e-3
    config.optim.ema_decay = 0.9
    config.train.total_steps = 60
    config.train.global_batch_size = 16
    config.eval.every_steps = 30
    config.eval.batch_size = 128
    config.checkpoint.every_steps = 3
    config.log.every_steps = 5
    return config
