"""The networks of benchmarks, and the operations of an image in them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.errors import UserError, unknown
from vitcls.models import resnet, vit, vit_config

NUM_CLASSES = 1000
NAMES = [*vit_config.EXAMPLES, *resnet.SIZES]  # architectures; a ViT may have any patch

Config = vit_config.ViTConfig | resnet.ResNetConfig


def arch_config(name: str, image_size: int) -> Config:
    """Returns the config of a network by its name, for square images.

    Raises:
      UserError: The name is unknown, or its patch does not divide the image.
    """
    sizes = dict(num_classes=NUM_CLASSES, image_size=(image_size, image_size))
    if name in resnet.SIZES:
        return resnet.resnet_config(name, **sizes)
    if vit_config.NAME.fullmatch(name):
        return vit_config.vit_config(name, **sizes)
    raise unknown("architecture --model", name, NAMES)


def make_model(config: Config, dtype: str, *, attention: str = "xla") -> nn.Module:
    """Returns our network, without dropout, and with BatchNorm trained.

    Raises:
      UserError: Another attention is requested for a ResNet.
    """
    if config.family != "resnet":
        return vit.ViT(config, jnp.dtype(dtype), attention=attention)
    if attention != "xla":
        raise UserError(f"--attention={attention}: a ResNet has none; leave the flag out.")
    return resnet.ResNet(config, jnp.dtype(dtype))


def published(config: Config) -> Config:
    """Returns the config of the network with the published cost, the work of a peer.

    Our ViT leaves out the unused part of its last layer, see `vit.Encoder`. Mean pooling reads
    every token, so with it the products are those of the paper's network.
    """
    return dataclasses.replace(config, pool="mean") if config.family == "vit" else config


def macs(config: Config) -> int:
    """Returns the multiply-adds of all products and convolutions of one image's forward pass.

    A training step is three times as many, and a multiply-add is two operations.
    """
    model = make_model(config, "float32")
    image = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    apply = functools.partial(model.apply, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), image)
    return macs_of(apply, variables, image)


def macs_of(function: Callable[..., Any], *args: Any) -> int:
    """Returns the multiply-adds of all products and convolutions of `function(*args)`."""
    return _macs(jax.make_jaxpr(function)(*args).jaxpr)


def _macs(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [var.aval.shape for var in eqn.invars]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            per_output = math.prod(shapes[0][dim] for dim in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            features_dim = eqn.params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(shapes[1]) // shapes[1][features_dim]
        else:
            # The bodies of `jit` and similar. The body of a loop would count once per round.
            assert eqn.primitive.name not in ("scan", "while")
            # If branches depend on the platform, the last one is the default.
            params = [*eqn.params.values(), *eqn.params.get("branches", ())[-1:]]
            bodies = (getattr(param, "jaxpr", param) for param in params)
            total += sum(_macs(body) for body in bodies if hasattr(body, "eqns"))
            continue
        total += per_output * eqn.outvars[0].aval.size
    return total
