"""Which parameters are trained: patterns over their names."""

import re
from typing import Any

from flax import traverse_util

from vitcls.errors import UserError

Params = dict[str, Any]


def names(params: Params) -> list[str]:
    """Returns the names of all parameters, such as `encoder/layer_0/mlp/fc1/kernel`."""
    return list(traverse_util.flatten_dict(params, sep="/"))


def match(params: Params, pattern: str, *, field: str) -> Params:
    """Returns a tree of bools: whether each parameter's whole name matches `pattern`.

    Raises:
      UserError: the pattern matches no parameter; `field` is what set it.
    """
    flat = {name: bool(re.fullmatch(pattern, name)) for name in names(params)}
    if not any(flat.values()):
        listed = "\n  ".join(flat)
        raise UserError(f"{field}={pattern!r} matches no parameter. The names are:\n  {listed}")
    return traverse_util.unflatten_dict(flat, sep="/")


def split(params: Params, freeze: str) -> tuple[Params, Params]:
    """Returns (trained, frozen): two trees without common leaves; `freeze` "" freezes nothing.

    Raises:
      UserError: the pattern matches no parameter, or all of them.
    """
    if not freeze:
        return params, {}
    frozen = traverse_util.flatten_dict(match(params, freeze, field="adapt.freeze"), sep="/")
    if all(frozen.values()):
        raise UserError(
            f"adapt.freeze={freeze!r} freezes every parameter: nothing is left to train."
        )
    flat = traverse_util.flatten_dict(params, sep="/")
    parts = [
        {name: leaf for name, leaf in flat.items() if frozen[name] is wanted}
        for wanted in (False, True)
    ]
    return tuple(traverse_util.unflatten_dict(part, sep="/") for part in parts)


def subtree(params: Params, like: Params) -> Params:
    """Returns the leaves of `params` that `like` has too."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: flat[path] for path in traverse_util.flatten_dict(like)}
    )


def merge(trained: Params, frozen: Params) -> Params:
    """Undoes `split`."""
    flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)
