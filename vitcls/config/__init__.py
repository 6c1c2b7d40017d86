"""The configuration: every field, and the check of all of them."""

import importlib

_PLACES = {"default_config": "fields", "check_config": "checks", "parse_arg": "parse"}


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(importlib.import_module(f"vitcls.config.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'vitcls.config' has no attribute {name!r}")
