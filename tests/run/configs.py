"""Configs of runs on digits, for tests of what a run is made from."""

from vitcls.config.fields import default_config


def make_config(checkpoint: str, **model):
    config = default_config()
    config.data.source = "digits"
    config.model.pretrained = checkpoint
    config.model.update(model)
    config.train.total_steps = 2
    config.train.global_batch_size = 16
    return config
