"""Pretrained weights in and out, in Hugging Face format.

`load` and `save` do everything; training takes the finer steps, so that every mistake is found
before any device work: `find`, `read_config`, `check_format`, `make_model`, `read_variables`,
`write_config`.
"""

from vitcls.pretrained.find import Files, find
from vitcls.pretrained.processor import Processor
from vitcls.pretrained.reading import (
    Config,
    load,
    make_model,
    read_config,
    read_json,
    read_variables,
)
from vitcls.pretrained.saving import check_format, save, write_config

__all__ = [
    "Config",
    "Files",
    "Processor",
    "check_format",
    "find",
    "load",
    "make_model",
    "read_config",
    "read_json",
    "read_variables",
    "save",
    "write_config",
]
