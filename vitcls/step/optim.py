"""Optimizers and schedules: optax, by name."""

import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from vitcls.errors import UserError, unknown
from vitcls.step import adapt

# The step cannot drive these optimizers, for the reason given.
_REFUSED = {
    "dpsgd": "it needs the gradient of every image by itself",
    "lbfgs": "its line search computes the loss several times in a step",
    "momo": "it needs the loss of every step",
    "momo_adam": "it needs the loss of every step",
    "optimistic_adam": "it takes no schedule; optimistic_adam_v2 does",
    "rprop": "it takes no schedule",
    "schedule_free": "it must be evaluated at other weights than those that it trains",
    "schedule_free_adamw": "it must be evaluated at other weights than those that it trains",
    "schedule_free_sgd": "it must be evaluated at other weights than those that it trains",
    "sm3": "it takes no schedule",
    "sophia": "it needs the diagonal of the Hessian",
}


def _find_optimizers(module: ModuleType) -> dict[str, Callable[..., optax.GradientTransformation]]:
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if "learning_rate" in inspect.signature(function).parameters
        and not name.startswith(("_", "scale_by_"))
        and name not in _REFUSED
    }


# Every function of optax that makes an optimizer from a learning rate, by name.
OPTIMIZERS = _find_optimizers(optax.contrib) | _find_optimizers(optax)
# The config's own fields set these arguments; `optim.args` may set all others.
_OWN_ARGS = {"learning_rate", "weight_decay", "mask", "weight_decay_mask"}


def make_schedule(
    name: str, *, lr: float, warmup_steps: int, total_steps: int, restarts: Sequence[int] = ()
) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up from 0 to `lr`, then `name`.

    Args:
      name: "cosine" or "linear", both to 0 at `total_steps`; "constant"; or "step", divided by 10
        at 30, 60 and 90 % of all steps, the warm-up included (Kolesnikov et al. 2020,
        arXiv:1912.11370, section 3.3).
      lr: Peak learning rate.
      restarts: Rising steps below `total_steps`; at each the schedule begins anew, with its warm-up
        (Loshchilov & Hutter 2017, arXiv:1608.03983).
    """
    cycles = [
        _make_cycle(name, lr=lr, warmup_steps=warmup_steps, num_steps=end - start)
        for start, end in itertools.pairwise([0, *restarts, total_steps])
    ]
    return optax.join_schedules(cycles, list(restarts)) if restarts else cycles[0]


def _make_cycle(name: str, *, lr: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    decay_steps = max(num_steps - warmup_steps, 1)
    divided = optax.piecewise_constant_schedule(
        lr, {round(share * num_steps): 0.1 for share in (0.3, 0.6, 0.9)}
    )
    after = {
        "cosine": optax.cosine_decay_schedule(lr, decay_steps),
        "linear": optax.linear_schedule(lr, 0.0, decay_steps),
        "constant": optax.constant_schedule(lr),
        "step": lambda step: divided(step + warmup_steps),
    }[name]
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def check_args(name: str, args: dict[str, Any]) -> None:
    """Raises `UserError` for an optimizer or an argument of it that does not exist."""
    if name in _REFUSED:
        raise UserError(f"optim.name={name!r} cannot be used here: {_REFUSED[name]}.")
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
        tx = OPTIMIZERS[name](optax.constant_schedule(0.1), **args)
        return tx.update(x, tx.init(x), x)

    try:
        # Only shapes are computed: an array would start the devices, which launchers do not need.
        jax.eval_shape(try_out, jax.ShapeDtypeStruct((), jnp.float32))
    except Exception as error:
        raise UserError(f"optim.args={args} does not suit {name}: {error}") from error


class L2SP(NamedTuple):
    """L2-SP's rates: `alpha` for the pretrained parameters, `beta` for the head."""

    alpha: float
    beta: float


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    params: adapt.Params,
    weight_decay: float,
    decay: str,
    clip_norm: float,
    args: dict[str, Any],
    lr_factors: dict[str, float] | None = None,
    l2_sp: L2SP | None = None,
) -> optax.GradientTransformation:
    """Returns clipping, L2-SP, weight decay, the optax optimizer called `name`, scaling.

    Args:
      params: The trained parameters (arrays or shapes), for their names. The result also works on a
        part of them.
      weight_decay: Passed to the optimizer if it takes a weight decay and a mask (decoupled,
        Loshchilov & Hutter, arXiv:1711.05101). Otherwise added to the clipped gradient (L2).
      decay: Regular expression for the names of the parameters that are decayed.
      clip_norm: Largest global norm of the gradient; 0: no limit.
      args: Further arguments of the optax function.
      lr_factors: Factor of each parameter's update by name, see `adapt.lr_factors`.
      l2_sp: Added to the clipped gradient, see `pull_to_start`.
    """
    check_args(name, args)
    make = OPTIMIZERS[name]
    transforms = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if l2_sp is not None:
        transforms.append(pull_to_start(l2_sp))
    mask = None
    if weight_decay:
        is_decayed = adapt.match(params, decay, field="optim.decay")

        def mask(tree):
            return _map_names(lambda name, _: is_decayed[name], tree)

    accepted = inspect.signature(make).parameters
    mask_arg = next((arg for arg in ("mask", "weight_decay_mask") if arg in accepted), None)
    if "weight_decay" in accepted and mask_arg:
        args = dict(args, weight_decay=weight_decay, **{mask_arg: mask})
    elif weight_decay:
        transforms.append(optax.add_decayed_weights(weight_decay, mask))
    transforms.append(make(schedule, **args))
    if lr_factors is not None:
        transforms.append(
            optax.stateless(
                lambda updates, _: _map_names(lambda name, x: x * lr_factors[name], updates)
            )
        )
    return optax.chain(*transforms)


def pull_to_start(l2_sp: L2SP) -> optax.GradientTransformation:
    """Returns L2-SP: adds `rate (w - w0)`, the gradient of `rate / 2 |w - w0|^2`.

    w0 are the initial parameters, kept in the state; a new head's are zero. Li et al. 2018,
    arXiv:1802.01483, equation 2.
    """

    def update(grads, start, params):
        def add(name, grad, w, w0):
            rate = l2_sp.beta if re.fullmatch(adapt.HEAD, name) else l2_sp.alpha
            return grad + rate * (w - w0)

        return _map_names(add, grads, params, start), start

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.copy, params), update)


class ProbeState(NamedTuple):
    """State of `probe_first`: int32 () number of finished steps, and both optimizers' states."""

    count: jax.Array
    probe: optax.OptState
    main: optax.OptState


def probe_first(
    probe: optax.GradientTransformation, main: optax.GradientTransformation, *, num_steps: int
) -> optax.GradientTransformation:
    """Returns `probe` on the head alone for `num_steps`, then `main`, as new, on all parameters.

    Kumar et al. 2022, arXiv:2202.10054.
    """

    def init(params):
        head, _ = adapt.split(params, train="head")
        return ProbeState(jnp.zeros((), jnp.int32), probe.init(head), main.init(params))

    def update(grads, state, params):
        def probe_update():
            head_grads, rest = adapt.split(grads, train="head")
            updates, after = probe.update(
                head_grads, state.probe, adapt.subtree(params, head_grads)
            )
            return adapt.merge(updates, jax.tree.map(jnp.zeros_like, rest)), after, state.main

        def main_update():
            updates, after = main.update(grads, state.main, params)
            return updates, state.probe, after

        updates, *after = jax.lax.cond(state.count < num_steps, probe_update, main_update)
        return updates, ProbeState(state.count + 1, *after)

    return optax.GradientTransformation(init, update)


def _map_names(function: Callable[..., Any], tree: adapt.Params, *rest: adapt.Params) -> Any:
    """`function(name, leaf, *leaves of rest)` for each leaf; what optax masks is not a leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        tree,
        *rest,
    )
