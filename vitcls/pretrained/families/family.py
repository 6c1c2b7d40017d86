"""A family of checkpoints: how its config, its tensors and its preprocessing are stored."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vitcls.models.resnet import ResNetConfig
from vitcls.models.vit_config import ViTConfig
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.keys import Key
from vitcls.pretrained.processor import Processor

Config = ViTConfig | ResNetConfig
MAX_CLASSES = 1 << 17  # ImageNet-21k has 21 841


def label_names(num_classes: int) -> dict[int, str]:
    """Names for classes that have none, as `transformers` makes them up."""
    return {index: f"LABEL_{index}" for index in range(num_classes)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints that are stored alike: all that reading and writing them needs.

    Attributes:
      read_config: `(config.json, num_classes, names of the tensors or None if there are none yet)
        -> config`; raises `UserError` for values that are not supported.
      write_config: `config -> content of a config.json` except the class names; None for formats
        that are only read.
      key_table: `(config, prefix) -> keys`, one for every variable of the network, by the names
        that `save_pretrained` writes; so do we.
      key_table_in_memory: The same by the names that modules of transformers 5 have, where they are
        others, as in files of `state_dict()`, accelerate's `save_model` and
        `save_original_format=False`.
      prefix: Begins the names of the backbone's tensors if there is a head. Without a head they
        have none when we write, and may have it when we read.
      heads: Tensors that show that there is a head.
      ignored: Matches the names, without the prefix, of tensors that classification does not use.
      unused: `config -> tensors` (without the prefix) that torch's network has and ours does not.
      read_class_names: Class names by index, from config.json; None: as Hugging Face has them.
      read_processor: How images are prepared, from config.json and the class names; None: from a
        preprocessor_config.json.
      processor_type: What a preprocessor_config.json without a type means.
      has_image_size: Whether a config.json has one; otherwise the preprocessing's size counts.
      takes_any_size: Whether the network resizes its position embeddings to what it is given: the
        preprocessing then says for what size, and config.json for what size they are stored.
      antialias: Whether it does so with antialiasing.
      spare_bytes: What a flax file may hold besides twice the network: names, a small network's
        pooler, a text tower.
    """

    read_config: Callable[[JsonFields, int, set[str] | None], Config]
    write_config: Callable[[Config], dict[str, Any]] | None
    key_table: Callable[[Config, str], list[Key]]
    prefix: str
    heads: Sequence[str]
    ignored: re.Pattern
    key_table_in_memory: Callable[[Config, str], list[Key]] | None = None
    unused: Callable[[Config], Mapping[str, np.ndarray]] = lambda config: {}
    read_class_names: Callable[[JsonFields], dict[int, str]] | None = None
    read_processor: Callable[[JsonFields, Mapping[int, str]], Processor] | None = None
    processor_type: str = "ViTImageProcessor"
    has_image_size: bool = True
    takes_any_size: bool = False
    antialias: bool = False
    spare_bytes: int = 1 << 20

    def has_head(self, tensors: set[str]) -> bool:
        """Whether a checkpoint with tensors of these names has a head."""
        return not tensors.isdisjoint(self.heads)

    def written_prefix(self, config: Config) -> str:
        """What begins the names of the backbone's tensors when `config`'s network is written."""
        return self.prefix if config.num_classes else ""

    def prefix_of(self, tensors: set[str]) -> str:
        """What begins the names of the backbone's tensors among these."""
        return self.prefix if any(name.startswith(self.prefix) for name in tensors) else ""

    def head_tensors(self, config: Config, tensors: set[str]) -> set[str]:
        """The tensors among these that belong to a head of any kind."""
        prefix = self.prefix_of(tensors)

        def module(name: str) -> str:
            return name.removeprefix(prefix).partition(".")[0]

        without, with_head = (
            {module(name) for key in self.key_table(one, prefix) for name in key.theirs}
            for one in (
                dataclasses.replace(config, num_classes=0),
                dataclasses.replace(config, num_classes=1),
            )
        )
        return {name for name in tensors if module(name) in with_head - without}

    def table_of(self, config: Config, tensors: set[str]) -> list[Key]:
        """The key table whose names most of these tensors have."""
        prefix = self.prefix_of(tensors)
        makers = filter(None, (self.key_table, self.key_table_in_memory))

        def num_found(table: list[Key]) -> int:
            return sum(name in tensors for key in table for name in key.theirs)

        return max((make(config, prefix) for make in makers), key=num_found)
