"""Optimizers and schedules: optax, by name."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vitcls import adapt
from vitcls.errors import UserError, unknown

OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sgd": optax.sgd,
}
# What the config's own fields set; the rest of a signature is open to `optim.args`.
_OWN_ARGS = {"learning_rate", "weight_decay", "mask"}


def make_schedule(name: str, *, lr: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up from 0 to `lr`, then `name`.

    Args:
      name: "cosine" or "linear", both to 0 at `total_steps`, or "constant".
    """
    decay_steps = max(total_steps - warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(lr, decay_steps),
        "linear": optax.linear_schedule(lr, 0.0, decay_steps),
        "constant": optax.constant_schedule(lr),
    }[name]
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def check_args(name: str, args: dict[str, Any]) -> None:
    """Raises `UserError` for an optimizer or an argument of it that does not exist."""
    if name not in OPTIMIZERS:
        raise unknown("optimizer optim.name", name, OPTIMIZERS)
    accepted = set(inspect.signature(OPTIMIZERS[name]).parameters) - _OWN_ARGS
    for arg in args:
        if arg in _OWN_ARGS:
            raise UserError(
                f"optim.args.{arg} has a field of its own: optim.lr, weight_decay, decay."
            )
        if arg not in accepted:
            raise unknown(f"argument of {name} in optim.args", arg, accepted)

    def try_out(x):
        tx = OPTIMIZERS[name](0.1, **args)
        return tx.update(x, tx.init(x), x)

    try:
        jax.eval_shape(try_out, jnp.zeros(()))
    except Exception as error:
        raise UserError(f"optim.args={args} does not suit {name}: {error}") from error


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    params: adapt.Params,
    weight_decay: float,
    decay: str,
    clip_norm: float,
    args: dict[str, Any],
) -> optax.GradientTransformation:
    """Returns clipping, then weight decay, then the optax optimizer called `name`.

    Args:
      params: The trained parameters (arrays or shapes): says which names exist.
      weight_decay: Given to the optimizer where it has such an argument (decoupled, Loshchilov &
        Hutter, arXiv:1711.05101), otherwise added to the clipped gradient (L2).
      decay: Regular expression for the names of the parameters that are decayed.
      clip_norm: Global norm that gradients are scaled down to; 0: never.
      args: Further arguments of the optax function.
    """
    check_args(name, args)
    make = OPTIMIZERS[name]
    transforms = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    mask = adapt.match(params, decay, field="optim.decay") if weight_decay else None
    if "weight_decay" in inspect.signature(make).parameters:
        args = dict(args, weight_decay=weight_decay, mask=mask)
    elif weight_decay:
        transforms.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*transforms, make(schedule, **args))
