"""Selects the parameters to train by patterns over their names, and adds LoRA.

D and E are the sides of a kernel, r is the rank of LoRA's factors.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from vitcls.errors import UserError
from vitcls.models.vit_config import HEADS

Params = dict[str, Any]

HEAD = rf"({'|'.join(HEADS)})/.*"
# Short names for patterns. The head is always trained in addition.
TRAINED = {
    "all": r".*",
    "head": HEAD,
    "attention": r".*/attention/.*",
    "bias": r".*/bias",
}
LORA = ("lora_a", "lora_b", "lora_scale")
_LAYER = re.compile(r"encoder/(?:layer|stage)_(\d+)/.*")
_EMBEDDINGS = re.compile(r"(embeddings|embedder|layernorm_pre)/.*")


def names(params: Params) -> list[str]:
    """Returns the names of all parameters, such as `encoder/layer_0/mlp/fc1/kernel`."""
    return list(traverse_util.flatten_dict(params, sep="/"))


def match(params: Params, pattern: str, *, field: str) -> dict[str, bool]:
    """Returns whether each parameter's whole name matches `pattern`.

    Raises:
      UserError: the pattern, which comes from the config's `field`, matches no parameter.
    """
    flat = {name: bool(re.fullmatch(pattern, name)) for name in names(params)}
    if not any(flat.values()):
        listed = "\n  ".join(flat)
        raise UserError(f"{field}={pattern!r} matches no parameter. The names are:\n  {listed}")
    return flat


def split(params: Params, freeze: str = "", *, train: str = "all") -> tuple[Params, Params]:
    """Returns (trained, frozen): two trees without common leaves.

    Args:
      freeze: Regular expression for parameters that stay, even if `train` names them; "": none.
      train: A name of `TRAINED` or a regular expression; the head is always trained.

    Raises:
      UserError: a pattern matches no parameter or changes nothing, or nothing is left to train.
    """
    matches = match(params, TRAINED.get(train, train), field="adapt.train")
    trained = {name for name in matches if matches[name] or re.fullmatch(HEAD, name)}
    if freeze:
        matches = match(params, freeze, field="adapt.freeze")
        if not any(matches[name] for name in trained):
            raise UserError(
                f"adapt.freeze={freeze!r} has no effect: adapt.train={train!r} trains nothing that "
                "it matches. Change adapt.train, or leave adapt.freeze at ''."
            )
        trained = {name for name in trained if not matches[name]}
    if not trained:
        raise UserError(
            f"adapt.freeze={freeze!r} freezes all that adapt.train={train!r} trains: nothing is "
            "left to train."
        )
    parts = {}, {}
    for name, leaf in traverse_util.flatten_dict(params, sep="/").items():
        parts[name not in trained][name] = leaf
    return tuple(traverse_util.unflatten_dict(part, sep="/") for part in parts)


def subtree(params: Params, like: Params) -> Params:
    """Returns the leaves of `params` that are also in `like`."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: flat[path] for path in traverse_util.flatten_dict(like)}
    )


def merge(trained: Params, frozen: Params) -> Params:
    """Undoes `split`."""
    flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)


def layer_numbers(params: Params) -> dict[str, int]:
    """Returns the depth of each parameter by name: embeddings 0, layer or stage i at i + 1.

    All that follows the last layer, such as the final norm and the head, is one deeper.
    """
    found = {name: _LAYER.fullmatch(name) for name in names(params)}
    numbers = {name: int(layer[1]) + 1 for name, layer in found.items() if layer}
    last = max(numbers.values(), default=0) + 1
    return {name: numbers.get(name, 0 if _EMBEDDINGS.fullmatch(name) else last) for name in found}


def lr_factors(
    trained: Params,
    frozen: Params,
    *,
    lr_scale: tuple[tuple[str, float], ...],
    layer_decay: float,
) -> dict[str, float] | None:
    """Returns the factor of each trained parameter's learning rate by name; None: 1 for all.

    Args:
      trained: The trained parameters (arrays or shapes).
      frozen: The others, which count for the depth.
      lr_scale: (regular expression, factor). All factors that match a parameter are multiplied.
      layer_decay: Factor from a layer to the one below; the deepest have 1 (Clark et al. 2020,
        arXiv:2003.10555, and Bao et al. 2021, arXiv:2106.08254).

    Raises:
      UserError: a pattern matches no trained parameter.
    """
    if not lr_scale and layer_decay == 1:
        return None
    numbers = layer_numbers(merge(trained, frozen))
    last = max(numbers.values())
    factors = {name: layer_decay ** (last - numbers[name]) for name in names(trained)}
    for pattern, factor in lr_scale:
        for name, matched in match(trained, pattern, field="adapt.lr_scale").items():
            factors[name] *= factor if matched else 1.0
    return factors


def hold_backbone(params: Params) -> Params:
    """Returns the same parameters; gradients reach only those of the head."""
    held = {
        name: leaf if re.fullmatch(HEAD, name) else jax.lax.stop_gradient(leaf)
        for name, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }
    return traverse_util.unflatten_dict(held, sep="/")


def add_lora(
    trained: Params, frozen: Params, key: jax.Array, *, rank: int, alpha: float, targets: str
) -> tuple[Params, Params]:
    """Adds low-rank factors to frozen kernels (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    A kernel W (D, E) acts as `W + scale A B`. `lora_a` A (D, r) and `lora_b` B (r, E) are trained;
    `lora_scale` (), alpha / r, is frozen. The fused q, k and v share one A.

    Args:
      key: Samples A.
      targets: Regular expression for the names of the kernels.

    Raises:
      UserError: `targets` matches nothing, a trained parameter, or one that is not the kernel of a
        dense layer.
    """
    matches = match(merge(trained, frozen), targets, field="adapt.lora_targets")
    trained, frozen = (traverse_util.flatten_dict(tree) for tree in (trained, frozen))
    matched = sorted(tuple(name.split("/")) for name in matches if matches[name])
    for index, path in enumerate(matched):
        name = "/".join(path)
        if path in trained:
            raise UserError(
                f"adapt.lora_targets matches {name}, which is trained itself; leave it out there, "
                "or in adapt.train, or add it to adapt.freeze."
            )
        if path[-1] != "kernel" or frozen[path].ndim != 2:
            raise UserError(
                f"adapt.lora_targets matches {name}, which is not the kernel of a dense layer; "
                "use "
                r"'.*/(attention|mlp)/.*/kernel', for example."
            )
        layer, (rows, columns) = path[:-1], frozen[path].shape
        # A is uniform as torch's initial kernels. B is zero, so that nothing changes at first.
        init_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        trained[*layer, "lora_a"] = init_a(jax.random.fold_in(key, index), (rows, rank))
        trained[*layer, "lora_b"] = jnp.zeros((rank, columns))
        frozen[*layer, "lora_scale"] = jnp.asarray(alpha / rank, jnp.float32)
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def fold_lora(params: Params) -> Params:
    """Returns the parameters with `W + scale A B` in place of each W; without LoRA, the same."""
    flat = traverse_util.flatten_dict(params)
    # In float32, because the result is evaluated and exported.
    for layer in [path[:-1] for path in flat if path[-1] == "lora_a"]:
        a, b, scale = (flat.pop((*layer, name)) for name in LORA)
        flat[*layer, "kernel"] = flat[*layer, "kernel"] + scale * jnp.matmul(
            a, b, precision="highest"
        )
    return traverse_util.unflatten_dict(flat)


def with_lora(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a flax module's `apply` for parameters with LoRA's factors, kept apart: x W + x A B.

    The step saves the gradients of whole kernels, which folded kernels would need.
    """

    def add_low_rank(call, args, kwargs, context):
        y, layer = call(*args, **kwargs), context.module
        if not (isinstance(layer, nn.Dense) and layer.has_variable("params", LORA[0])):
            return y
        a, b, scale = (layer.get_variable("params", name) for name in LORA)
        x, a, b = nn.dtypes.promote_dtype(args[0], scale * a, b, dtype=layer.dtype)
        low_rank = x @ a @ b
        # A tuple is q, k and v, which share A.
        if isinstance(y, tuple):
            return tuple(map(jnp.add, y, jnp.split(low_rank, len(y), axis=-1)))
        return y + low_rank

    def applied(*args, **kwargs):
        with nn.intercept_methods(add_low_rank):
            return apply(*args, **kwargs)

    return applied
