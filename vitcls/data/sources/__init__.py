"""Data sets by name: `open_split("digits", "train")`."""

import importlib

_PLACES = {
    "open": ("home", "open_split", "split_names"),
    "split": ("Split", "Subset"),
    "division": ("hold_out", "take_fold", "take_long_tail", "take_per_class"),
}


def __getattr__(name: str):
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"vitcls.data.sources.{module}"), name)
    raise AttributeError(f"module 'vitcls.data.sources' has no attribute {name!r}")
