"""From a network to a folder that Hugging Face's tools load unchanged."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vitcls.errors import UserError
from vitcls.files import folder_aside, write_json
from vitcls.pretrained import keys
from vitcls.pretrained.files import formats
from vitcls.pretrained.files.json_fields import JsonFields
from vitcls.pretrained.find import CONFIG, PREPROCESSOR
from vitcls.pretrained.processor import Processor, to_json
from vitcls.pretrained.reading import FAMILIES, Config


def save(
    directory: str | Path,
    model: nn.Module,
    variables: Mapping[str, Any],
    processor: Processor,
    *,
    dtype: np.dtype | None = None,
) -> None:
    """Writes config, preprocessing and weights; the folder appears when it is complete.

    Args:
      directory: New, or an empty folder.
      model: The network; its `config` says what is written.
      variables: `{"params": ...}`, and "batch_stats" with BatchNorm, of float32 arrays.
      processor: Its `id2label` names the classes.
      dtype: Type to store the weights in, such as `np.float16`; None keeps theirs. Readers convert
        to float32, so half precision only costs a relative rounding error of 5e-4, once.

    Raises:
      UserError: the folder is not empty, the format cannot describe the network, or a tensor is not
        finite in the type to store.
    """
    arrays = jax.tree.map(np.asarray, dict(variables))
    family = FAMILIES[model.config.family]
    prefix = family.written_prefix(model.config)
    tensors = keys.dump(arrays, family.key_table(model.config, prefix))
    if dtype is not None:
        with np.errstate(over="ignore"):  # refused below, by name
            tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    # Without them `transformers` reports tensors as missing and initialises them at random.
    tensors |= {prefix + name: tensor for name, tensor in family.unused(model.config).items()}
    with folder_aside(directory, flag="") as aside:
        write_config(aside, model.config, processor)
        formats.write(aside / formats.SINGLE, tensors)


def write_config(directory: str | Path, config: Config, processor: Processor) -> None:
    """Writes only the two JSON files, each aside first; makes the folder if it is missing.

    Raises:
      UserError: the format cannot describe the network, or there is not one name per class.
    """
    directory = Path(directory)
    if len(processor.id2label) != config.num_classes:
        raise UserError(
            f"The network has {config.num_classes} classes and the processor's id2label names "
            f"{len(processor.id2label)}; give one name for each class."
        )
    content = config_to_json(config) | {
        "id2label": {str(index): name for index, name in processor.id2label.items()},
        "label2id": {name: index for index, name in processor.id2label.items()},
        "dtype": "float32",  # what to compute in; stored weights may be narrower
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, content)
    write_json(directory / PREPROCESSOR, to_json(processor))


def check_format(config: Config) -> None:
    """Raises `UserError` if the family's format cannot describe the network, as `save` would.

    For the start of a run: hours of training should not end with this.
    """
    config_to_json(config)


def config_to_json(config: Config) -> dict[str, Any]:
    """The content of a config.json except the class names.

    Raises:
      UserError: the family's format cannot describe the network.
    """
    family = FAMILIES[config.family]
    content = family.write_config(config)
    read = family.read_config(JsonFields(content, path=CONFIG), config.num_classes, None)
    if not family.has_image_size:
        read = dataclasses.replace(read, image_size=config.image_size)
    if read != config:
        raise UserError(f"The {config.family!r} format cannot describe this network: {config}.")
    return content
