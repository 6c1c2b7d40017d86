"""The configuration: every field, and the check of all of them."""

import importlib

_PLACES = {"fields": ("default_config", "check_config", "parse_arg")}


def __getattr__(name: str):
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"vitcls.config.{module}"), name)
    raise AttributeError(f"module 'vitcls.config' has no attribute {name!r}")
