"""Data sets by name: `open_split("digits", "train")`."""

import importlib

# Names of the package that `open` has; all others are modules, which must not wait for it.
_NAMES = (
    "Split", "Subset", "hold_out", "home", "open_split", "split_names", "take_fold",
    "take_long_tail", "take_per_class",
)  # fmt: skip


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module("vitcls.data.sources.open"), name)
    raise AttributeError(f"module 'vitcls.data.sources' has no attribute {name!r}")
