"""Fine-tune pretrained image classifiers in JAX."""

import importlib
import time

# `results.json` reports wall time from here: the first line that a command of this package runs.
START_TIME = time.time()

__version__ = "0.1.0"


def __getattr__(name: str):
    # `vitcls.pretrained` works after `import vitcls`, yet `--help` does not pay for importing jax.
    if name == "pretrained":
        return importlib.import_module("vitcls.pretrained")
    raise AttributeError(f"module 'vitcls' has no attribute {name!r}")
