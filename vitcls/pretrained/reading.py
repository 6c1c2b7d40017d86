"""From a checkpoint's files to a network, its variables and its preprocessing."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcls.errors import UserError, unknown
from vitcls.models.resnet import ResNet, ResNetConfig
from vitcls.models.vit import ViT
from vitcls.models.vit_config import HEADS, ViTConfig
from vitcls.pretrained import keys, processor
from vitcls.pretrained.families.clip import CLIP, SIGLIP
from vitcls.pretrained.families.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from vitcls.pretrained.families.family import MAX_CLASSES, Config, Family, label_names
from vitcls.pretrained.families.resnet import RESNET
from vitcls.pretrained.families.timm import TIMM, is_timm
from vitcls.pretrained.families.vit import DEIT, VIT, VIT_MAE
from vitcls.pretrained.files import formats
from vitcls.pretrained.files.flax_file import FlaxWeights
from vitcls.pretrained.files.formats import Weights
from vitcls.pretrained.files.json_fields import JsonFields, is_number
from vitcls.pretrained.files.torch_file import TorchWeights
from vitcls.pretrained.find import CONFIG, PREPROCESSOR, PROCESSOR, Files, find
from vitcls.pretrained.positions import resize_positions
from vitcls.pretrained.processor import Processor
from vitcls.pretrained.run import find_run

log = logging.getLogger("vitcls")

# `model_type` of a config.json -> what its fields and its tensors' names are.
FAMILIES: dict[str, Family] = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "deit": DEIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    "resnet": RESNET,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "vit": VIT,
    "vit_mae": VIT_MAE,
}
_SINGLE_LABEL = "single_label_classification"
_PROBLEM_TYPES = (_SINGLE_LABEL, "multi_label_classification", "regression")


def read_config(files: Files, *, new_head: bool = False) -> tuple[Config, Processor]:
    """Reads which network a checkpoint holds and how images are prepared for it.

    Reads the JSON files and the names of the tensors, not their data where they are in
    safetensors. A checkpoint without a head gives `num_classes=0` and no class names.

    Args:
      files: The checkpoint.
      new_head: Whether to leave out the checkpoint's head and class names.

    Raises:
      UserError: an unsupported family, or a field with an unsupported value.
    """
    names = _open_weights(files, new_head=new_head).names()
    return read_json(files.directory, tensors=names, new_head=new_head)


def _open_weights(files: Files, *, new_head: bool) -> Weights | FlaxWeights | TorchWeights:
    """The weights of a folder. Flax's are read at once, so their size must fit the network."""
    names = formats.readable(allow_pickle=files.allow_pickle)
    name = next((name for name in names if (files.directory / name).exists()), formats.SINGLE)
    path = files.directory / name
    if name in formats.PICKLES:
        return TorchWeights(path)
    if name != formats.FLAX:
        return Weights(files.directory)
    stored = _read_stored(files.directory, tensors=None, new_head=new_head)
    config = stored.config
    if new_head:  # the file may have a head of any width
        config = dataclasses.replace(config, num_classes=MAX_CLASSES)
    fields = JsonFields.read(files.directory / CONFIG)
    if fields.number("layerscale_value", 1) != 1:
        # DINOv2's Flax class multiplies LayerScale by it, twice, and torch's does not.
        raise fields.error("layerscale_value", f"1 next to a {formats.FLAX}")
    num_values = sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(config)))
    # float32; twice, as a bare network has a pooler.
    max_bytes = 2 * 4 * num_values + stored.family.spare_bytes
    if path.stat().st_size > max_bytes:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, and the network that the config describes "
            f"needs {max_bytes} at most; get both again."
        )
    return FlaxWeights(path)


def read_json(
    directory: Path, *, tensors: set[str] | None, new_head: bool = False
) -> tuple[Config, Processor]:
    """`read_config` for a folder that may lack the weights, as a run's does.

    Args:
      directory: Holds config.json and preprocessor_config.json.
      tensors: Names of the checkpoint's tensors, which tell whether it has a head; None: it has.
      new_head: See `read_config`.
    """
    stored = _read_stored(directory, tensors=tensors, new_head=new_head)
    if not stored.family.takes_any_size:
        return stored.config, stored.processor
    config = dataclasses.replace(stored.config, image_size=stored.processor.size)
    return config, stored.processor


class _Stored(NamedTuple):
    """What a checkpoint's JSON files say."""

    family: Family
    config: Config  # of the network whose variables are stored
    processor: Processor


def _read_stored(directory: Path, *, tensors: set[str] | None, new_head: bool) -> _Stored:
    fields = JsonFields.read(directory / CONFIG)
    family = _family(fields)
    has_head = not new_head and (tensors is None or family.has_head(tensors))
    read_class_names = family.read_class_names or _class_names
    id2label = read_class_names(fields) if has_head else {}
    config = family.read_config(fields, len(id2label), tensors)
    if family.read_processor is not None:
        prepared = family.read_processor(fields, id2label)
    else:
        prepared = processor.read(
            _preprocessing(directory), id2label=id2label, default=family.processor_type
        )
    if not family.has_image_size:
        config = dataclasses.replace(config, image_size=prepared.size)
    if not family.takes_any_size:
        # The two files rarely differ. The network takes one size only, so this one counts.
        prepared = prepared.resized(config.image_size)
    return _Stored(family, config, prepared)


def _preprocessing(directory: Path) -> JsonFields:
    """How images are prepared: from a file of its own, or from an image-text model's."""
    if (directory / PROCESSOR).exists() and not (directory / PREPROCESSOR).exists():
        return JsonFields.read(directory / PROCESSOR).group("image_processor")
    return JsonFields.read(directory / PREPROCESSOR)


def _family(fields: JsonFields) -> Family:
    """The family that a config.json names."""
    if "auto_map" in fields:
        raise UserError(f"{fields.path} asks to run code that it brings (auto_map); refused.")
    if is_timm(fields):
        return TIMM
    if "model_type" not in fields:
        raise UserError(f"{fields.path} has no model_type: it is not a Hugging Face config.")
    model_type = fields.string("model_type", "")
    if model_type not in FAMILIES:
        raise unknown("model_type", model_type, FAMILIES)
    return FAMILIES[model_type]


def _class_names(fields: JsonFields) -> dict[int, str]:
    """Class names by index, from id2label or else as many as num_labels (2 if it is absent)."""
    kind = fields.choice("problem_type", _SINGLE_LABEL, {name: name for name in _PROBLEM_TYPES})
    if kind != _SINGLE_LABEL:
        log.warning(
            "%s: problem_type=%s is not supported: probabilities here are those of one class per "
            "image.", fields.path, kind,
        )  # fmt: skip
    named = fields.any("id2label")
    if named is None:
        return label_names(fields.integer("num_labels", 2, at_most=MAX_CLASSES))
    if not isinstance(named, dict) or not 1 <= len(named) <= MAX_CLASSES:
        raise fields.error("id2label", "an object of class names")
    first = 0 if "0" in named else 1
    names = [named.get(str(key)) for key in range(first, first + len(named))]
    for key, name in enumerate(names, first):
        if not (isinstance(name, str) or is_number(name)):
            raise fields.error(
                "id2label",
                f"class names under the keys 0 to {len(named) - 1}, or 1 to {len(named)}; there is "
                f"none under {key}",
            )
    names = list(map(str, names))
    if first:
        log.warning(
            "%s: id2label counts from 1; the head's first class is %r, the last %r.",
            fields.path, names[0], names[-1],
        )  # fmt: skip
    return dict(enumerate(names))


def make_model(
    config: Config,
    *,
    dtype: jnp.dtype = jnp.float32,
    dropout_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    patch_dropout_rate: float = 0.0,
    train_batch_norm: bool = True,
    attention: str = "xla",
    remat: str = "none",
) -> nn.Module:
    """The network that `config` describes; see `ViT` and `ResNet` for the arguments.

    Raises:
      UserError: an argument other than its default means nothing to this network.
    """
    if isinstance(config, ResNetConfig):
        if dropout_rate or drop_path_rate:
            raise UserError(
                f"model.dropout={dropout_rate} and model.drop_path={drop_path_rate}: a ResNet has "
                "neither; both must be 0."
            )
        if patch_dropout_rate:
            raise UserError(
                f"model.patch_dropout={patch_dropout_rate}: a ResNet has no patches; it must be 0."
            )
        if attention != "xla":
            raise UserError(
                f"model.attention={attention!r}: a ResNet has no attention; leave it at 'xla'."
            )
        return ResNet(config, dtype=dtype, train_batch_norm=train_batch_norm, remat=remat)
    if not train_batch_norm:
        raise UserError(
            "model.batch_norm='frozen': this network has no BatchNorm; leave it at 'train'."
        )
    return ViT(
        config,
        dtype=dtype,
        dropout_rate=dropout_rate,
        drop_path_rate=drop_path_rate,
        patch_dropout_rate=patch_dropout_rate,
        attention=attention,
        remat=remat,
    )


def read_variables(files: Files, config: Config, *, new_head: bool = False) -> dict[str, Any]:
    """Reads a checkpoint's variables for a network that may differ in head and image size.

    Args:
      files: The checkpoint.
      config: What `read_config` gives, perhaps with another `num_classes` (then the head is new,
        and zero) or another `image_size` (then the position embeddings are resized).
      new_head: Makes a new head even if the checkpoint has one of the right width; the
        checkpoint's head may then have any shape.

    Returns:
      Nested dicts of float32 numpy arrays: "params", and "batch_stats" with BatchNorm.

    Raises:
      UserError: a tensor is missing, left over, or of another shape; lists all of them.
    """
    weights = _open_weights(files, new_head=new_head)
    names = weights.names()
    stored = _read_stored(files.directory, tensors=names, new_head=new_head)
    family, prefix = stored.family, stored.family.prefix_of(names)
    ignored = {name for name in names if family.ignored.fullmatch(name.removeprefix(prefix))}
    if new_head:
        ignored |= family.head_tensors(stored.config, names)
    variables = keys.load(
        weights,
        family.table_of(stored.config, names),
        shapes=variable_shapes(stored.config),
        ignored=ignored,
        source=files.source,
    )
    return fit_variables(
        variables, stored.config, config, antialias=family.antialias, new_head=new_head
    )


def fit_variables(
    variables: dict[str, Any],
    stored: Config,
    config: Config,
    *,
    antialias: bool,
    new_head: bool = False,
) -> dict[str, Any]:
    """Makes variables of the network `stored` those of `config`: see `read_variables`.

    Args:
      variables: Nested dicts of float32 numpy arrays; some are replaced.
      stored: The network's config.
      config: The wanted network's.
      antialias: How position embeddings are resized, see `resize_positions`.
      new_head: See `read_variables`.
    """
    params = variables["params"]
    if isinstance(stored, ViTConfig) and stored.grid != config.grid:
        log.info("Position embeddings resized from %s to %s patches.", stored.grid, config.grid)
        embeddings = params["embeddings"]
        embeddings["position_embeddings"] = resize_positions(
            embeddings["position_embeddings"],
            old=stored.grid,
            new=config.grid,
            antialias=antialias,
        )
    wanted = variable_shapes(config)
    if new_head or stored.num_classes != config.num_classes:
        for head in HEADS:
            params.pop(head, None)
            if head in wanted["params"]:
                log.info("New, zero: the %s of %d classes.", head, config.num_classes)
                params[head] = jax.tree.map(
                    lambda leaf: np.zeros(leaf.shape, np.float32), wanted["params"][head]
                )
    shapes = jax.tree.map(np.shape, variables)
    assert shapes == jax.tree.map(np.shape, wanted), "config is another network's"
    return variables


def variable_shapes(config: Config) -> Mapping[str, Any]:
    """The network's variables as nested dicts of `jax.ShapeDtypeStruct`."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    init = make_model(config).init
    return jax.eval_shape(lambda: init(jax.random.key(0), jnp.zeros(images.shape), train=False))


def _has_head_of(files: Files, num_classes: int) -> bool:
    """Whether the checkpoint's head has this many classes; its config may say otherwise."""
    weights = _open_weights(files, new_head=True)
    family = _family(JsonFields.read(files.directory / CONFIG))
    heads = weights.names().intersection(family.heads)
    return any(weights.shape(name)[:1] == (num_classes,) for name in heads)


def load(
    checkpoint: str | Path,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    dtype: jnp.dtype = jnp.float32,
    allow_pickle: bool = False,
) -> tuple[nn.Module, dict[str, Any], Processor]:
    """Loads a checkpoint, ready to apply.

    Args:
      checkpoint: A folder in Hugging Face's or timm's format, a hub id with optional `@revision`,
        or the workdir of a run with optional `@best`, `@last` or `@STEP`.
      num_classes: Width of the head. One that differs from the checkpoint's gives a new zero head,
        0 gives none.
      image_size: (height, width). One that differs from the checkpoint's resizes position
        embeddings.
      dtype: Type of the computation; parameters are float32.
      allow_pickle: See `find`.

    Returns:
      The network, its variables (`{"params": ...}`, and "batch_stats" with BatchNorm) and the
      processor:
      `model.apply(variables, processor(images), train=False)` gives float32 (B, K) logits.

    Raises:
      UserError: the checkpoint is missing or cannot be read.
    """
    run = find_run(checkpoint)
    new_head = False
    if run is None:
        files = find(checkpoint, allow_pickle=allow_pickle)
        new_head = num_classes is not None and not _has_head_of(files, num_classes)
        stored, prepared = read_config(files, new_head=new_head)
    else:
        stored, prepared = read_json(run.model, tensors=None)
    config = stored
    if num_classes is not None and num_classes != config.num_classes:
        config = dataclasses.replace(config, num_classes=num_classes)
        prepared = dataclasses.replace(prepared, id2label=label_names(num_classes))
    if image_size is not None:
        config = config.resized(image_size)
        prepared = prepared.resized(config.image_size)
    if run is None:
        variables = read_variables(files, config, new_head=new_head)
    else:
        variables = run.read_variables(variable_shapes(stored))
        antialias = FAMILIES[stored.family].antialias
        variables = fit_variables(variables, stored, config, antialias=antialias)
    return make_model(config, dtype=dtype), variables, prepared
