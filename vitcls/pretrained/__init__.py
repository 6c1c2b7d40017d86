"""Pretrained weights in and out, in Hugging Face format.

`load` and `save` do everything; training takes the finer steps, so that every mistake is found
before any device work: `find`, `read_config`, `make_model`, `read_params`, `write_config`.
"""

from vitcls.pretrained.find import Files, find
from vitcls.pretrained.processor import Processor
from vitcls.pretrained.reading import load, make_model, read_config, read_json, read_params
from vitcls.pretrained.saving import save, write_config

__all__ = [
    "Files",
    "Processor",
    "find",
    "load",
    "make_model",
    "read_config",
    "read_json",
    "read_params",
    "save",
    "write_config",
]
