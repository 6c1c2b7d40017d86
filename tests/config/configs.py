"""Configs that tests of this room start from."""

from ml_collections import ConfigDict

from vitcls.config.fields import default_config


def valid_config() -> ConfigDict:
    config = default_config()
    config.data.source = "digits"
    config.data.image_size = (32, 32)
    config.model.arch = "vit_nano4"
    config.train.total_steps = 10
    return config


def with_field(field: str, value) -> ConfigDict:
    config = valid_config()
    group, name = field.split(".")
    config[group][name] = value
    return config
