"""Data sets by name: `open_split("digits", "train")`."""

import importlib


def __getattr__(name: str):
    # A name of the package is one of `open`, which imports what the sources need.
    if not name.startswith("_"):
        module = importlib.import_module("vitcls.data.sources.open")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module 'vitcls.data.sources' has no attribute {name!r}")
