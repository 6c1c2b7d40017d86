"""The training step and the evaluation step, made of plain callables: no I/O, no config.

B batch, H W pixels, K classes.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitcls.augment.prepare import Batch, Prepare
from vitcls.step import adapt, losses

PyTree = Any
# (trained, fixed, batch_stats, images, targets, weights, keys), where fixed is (frozen, teacher) ->
#   weighted sum of the loss (), (sum of weights (), new batch_stats)
LossFn = Callable[..., tuple[jax.Array, tuple[jax.Array, PyTree]]]


@flax.struct.dataclass
class TrainState:
    """All that changes while training, and what stays: frozen parameters and the teacher.

    Attributes:
      step: int32 (), the number of finished steps.
      params: The trained parameters.
      frozen: The parameters that stay; `adapt.merge(params, frozen)` are all of them.
      batch_stats: Running statistics of BatchNorm; empty without it.
      opt_state: State of the optimizer.
      ema: Moving averages of `params` and `batch_stats`, or None.
      skips: int32 () each, the steps so far that changed nothing because loss or gradient were not
        finite: `total`, and `in_row`, those since the last one that did.
      num_empty: int32 (), the steps so far that changed nothing because no image of their batch
        counted: all were skipped.
      teacher: Variables of the network to learn from, or None; not part of a checkpoint.
    """

    step: jax.Array
    params: PyTree
    frozen: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    ema: PyTree | None
    skips: dict[str, jax.Array]
    num_empty: jax.Array
    teacher: PyTree | None = None

    def variables(self) -> PyTree:
        """The variables as trained: with LoRA, its factors beside the kernels."""
        return _variables(self.params, self.frozen, self.batch_stats)

    def averages(self) -> PyTree:
        """The moving averages, where there are any, in place of what they average."""
        if self.ema is None:
            return self.variables()
        return _variables(self.ema["params"], self.frozen, self.ema["batch_stats"])

    def eval_variables(self) -> PyTree:
        """The network's variables to evaluate and to export: the averages, with LoRA folded in."""
        return fold_lora(self.averages())


def fold_lora(variables: PyTree) -> PyTree:
    """Returns the variables of the plain network: see `adapt.fold_lora`."""
    return variables | {"params": adapt.fold_lora(variables["params"])}


def _variables(params: PyTree, frozen: PyTree, batch_stats: PyTree) -> PyTree:
    variables = {"params": adapt.merge(params, frozen)}
    return variables | ({"batch_stats": batch_stats} if batch_stats else {})


def init_state(
    variables: PyTree,
    tx: optax.GradientTransformation,
    *,
    use_ema: bool,
    split: Callable[[PyTree], tuple[PyTree, PyTree]] = adapt.split,
) -> TrainState:
    """Returns the state before the first step; the average starts as the weights themselves.

    Args:
      variables: The network's.
      tx: The optimizer.
      use_ema: Whether to keep moving averages.
      split: Parameters -> (trained, frozen).
    """
    params, frozen = split(variables["params"])
    batch_stats = variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
        if use_ema
        else None,
        skips={"total": jnp.zeros((), jnp.int32), "in_row": jnp.zeros((), jnp.int32)},
        num_empty=jnp.zeros((), jnp.int32),
    )


def make_loss_fn(
    apply: Callable[..., Any],
    loss: losses.Loss = losses.cross_entropy,
    class_weights: np.ndarray | None = None,
    distil: Callable[..., jax.Array] | None = None,
    *,
    may_skip: bool = True,
) -> LossFn:
    """Returns the loss of a network, summed over a batch.

    Args:
      apply: A flax module's `apply`. BatchNorm's statistics come back as the mutable collection
        `batch_stats`, if there are any; such a network takes a `mask`, see `resnet.ResNet`.
      loss: Of one image.
      class_weights: (K,) factors of an image's weight; that of a dense target is their mean under
        it. None: all 1.
      distil: `(teacher, images, logits, loss (B,)) -> loss (B,)`, see `make_distil`; None: no
        distillation.
      may_skip: Whether images may have weight 0 because they were skipped. If not, BatchNorm is
        computed without a mask: a tenth faster on CPU.
    """

    def loss_fn(params, fixed, batch_stats, images, targets, weights, keys):
        frozen, teacher = fixed
        options = {}
        if batch_stats and may_skip:
            is_image = weights > 0
            has_images = jnp.any(is_image)
            # The mean of no image is not finite, and 0 times its gradient is not 0. A pass without
            # images is normalised by its black rows instead, which enter no loss.
            options = {"mask": is_image | ~has_images}
        logits, updated = apply(
            _variables(params, frozen, batch_stats),
            images,
            train=True,
            keys=keys,
            mutable=["batch_stats"],
            **options,
        )
        new_stats = updated.get("batch_stats", batch_stats)
        if options:
            new_stats = jax.tree.map(
                lambda new, old: jnp.where(has_images, new, old), new_stats, batch_stats
            )
        if class_weights is not None:
            weights = weights * jnp.sum(targets * class_weights[None], axis=-1)
        image_loss = loss(logits, targets)
        if distil is not None:
            image_loss = distil(teacher, images, logits, image_loss)
        loss_sum = jnp.sum(image_loss * weights)
        return loss_sum, (jnp.sum(weights), new_stats)

    return loss_fn


def make_distil(
    teacher_logits: Callable[[PyTree, jax.Array], jax.Array], *, weight: float, temperature: float
) -> Callable[..., jax.Array]:
    """Returns what mixes `losses.distillation` into the loss of each image.

    The teacher is shown the very images that the network sees, augmented and mixed (Beyer et al.
    2021, arXiv:2106.05237).

    Args:
      teacher_logits: `(teacher's variables, images) -> logits (B, K)`.
      weight: Share of the teacher, from 0 to 1; the rest is the loss against the labels.
      temperature: Of the distillation.
    """

    def distil(teacher, images, logits, image_loss):
        taught = losses.distillation(
            logits, teacher_logits(teacher, images), temperature=temperature
        )
        return (1 - weight) * image_loss + weight * taught

    return distil


def sample_keys(key: jax.Array, step: jax.Array, batch_size: int) -> jax.Array:
    """Returns one key per image of the global batch, (B,): a function of (key, step, row) only."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, jnp.arange(batch_size))


def image_keys(key: jax.Array, step: jax.Array, batch_size: int) -> jax.Array:
    """Returns two keys per image, (B, 2): for what `prepare` does to it, and for the network."""
    return jax.vmap(lambda k: jax.random.split(k, 2))(sample_keys(key, step, batch_size))


def in_passes(
    grad_fn: Callable[..., Any], num_passes: int, *, group_size: int = 1
) -> Callable[..., Any]:
    """Makes a sum over a batch, and its gradient, the sum of several passes over parts of it.

    The memory is that of one pass. Of `A` passes, pass a takes the rows a, a + A, a + 2 A, ...
    (or groups of rows): every device then divides the rows that it has. BatchNorm normalises each
    pass by itself and moves its running statistics in each; nothing else depends on the number of
    passes.

    Args:
      grad_fn: `(params, fixed, batch_stats, *arrays (B, ...)) -> (loss sum, (weight sum,
        batch_stats)), gradient of the loss sum`.
      num_passes: A, a divisor of the groups on one device.
      group_size: Number of neighbours that stay together, because they are mixed.
    """
    if num_passes == 1:
        return grad_fn

    def split(array):  # (B, ...) -> (A, B / A, ...)
        groups = array.reshape(-1, num_passes, group_size, *array.shape[1:]).swapaxes(0, 1)
        return groups.reshape(num_passes, -1, *array.shape[1:])

    def summed(params, fixed, batch_stats, *arrays):
        def add_pass(carry, part):
            sums, batch_stats = carry
            (loss, (weight, batch_stats)), grads = grad_fn(params, fixed, batch_stats, *part)
            return (jax.tree.map(jnp.add, sums, (loss, weight, grads)), batch_stats), None

        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        parts = jax.tree.map(split, arrays)
        ((loss, weight, grads), batch_stats), _ = jax.lax.scan(
            add_pass, (zeros, batch_stats), parts
        )
        return (loss, (weight, batch_stats)), grads

    return summed


def make_train_step(
    prepare: Prepare,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array,
    schedule: optax.Schedule,
    ema_decay: float,
    num_passes: int = 1,
    group_size: int = 1,
    probe_steps: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `(state, batch) -> (new state, metrics)`, for the caller to compile.

    The metrics are `loss`, `grad_norm` (of the mean loss, before clipping), `lr` (what `schedule`,
    which `tx` follows, says of this step), `is_empty` (whether no image counts), and the
    new state's `skips`. For `num_passes` and `group_size` see `in_passes`. In the first
    `probe_steps` only the head has a gradient, and only that is computed.

    A step whose loss or gradient norm is not finite, or in which no image counts, changes nothing
    but the counts of steps.
    """

    def batch_loss(params, fixed, batch_stats, batch, keys):
        images, targets, weights = prepare(keys[:, 0], batch)
        return loss_fn(params, fixed, batch_stats, images, targets, weights, keys[:, 1])

    def probe_loss(params, *rest):
        return batch_loss(adapt.hold_backbone(params), *rest)

    # Sums, divided once: the mean does not depend on how a batch is split.
    grad_fn, probe_grad_fn = (
        in_passes(jax.value_and_grad(loss, has_aux=True), num_passes, group_size=group_size)
        for loss in (batch_loss, probe_loss)
    )

    def train_step(state, batch):
        keys = image_keys(key, state.step, batch["image"].shape[0])
        inputs = (state.params, (state.frozen, state.teacher), state.batch_stats, batch, keys)
        # As `tx` counts.
        num_updates = state.step - state.skips["total"] - state.num_empty
        if probe_steps:  # one branch is executed
            result = jax.lax.cond(num_updates < probe_steps, probe_grad_fn, grad_fn, *inputs)
        else:
            result = grad_fn(*inputs)
        (loss_sum, (weight_sum, batch_stats)), grads = result
        # No image counts where all are skipped, or of classes of weight 0: not 0 / 0 then.
        is_empty = weight_sum == 0
        weight_sum = jnp.where(is_empty, 1.0, weight_sum)
        grads = jax.tree.map(lambda g: g / weight_sum, grads)
        loss, grad_norm = loss_sum / weight_sum, optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        skips = count_skips(state.skips, is_finite, is_empty)
        step_metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": schedule(num_updates),
            "is_empty": is_empty,
            "skips": skips,
        }

        def update(old):
            updates, opt_state = tx.update(grads, old["opt_state"], old["params"])
            averaged = {
                "params": optax.apply_updates(old["params"], updates),
                "batch_stats": batch_stats,
            }
            ema = old["ema"]
            if ema is not None:
                ema = update_ema(ema, averaged, state.step, ema_decay)
            return averaged | {"opt_state": opt_state, "ema": ema}

        old = {name: getattr(state, name) for name in ("params", "batch_stats", "opt_state", "ema")}
        new = update_if(is_finite & ~is_empty, update, old)
        num_empty = state.num_empty + is_empty.astype(jnp.int32)
        counts = {"step": state.step + 1, "skips": skips, "num_empty": num_empty}
        return state.replace(**counts, **new), step_metrics

    return train_step


def update_if(condition: jax.Array, update: Callable[[PyTree], PyTree], old: PyTree) -> PyTree:
    """Returns `update(old)` where the condition, bool (), holds, otherwise `old`."""

    def branch(old):
        return jax.lax.cond(condition, update, lambda old: old, old)

    def select(old):
        return jax.tree.map(lambda new, old: jnp.where(condition, new, old), update(old), old)

    # On CPU a branch updates in place; a selection reads the optimizer's moments once more, for
    # which XLA copies them first. A GPU's host would have to wait for a branch's condition.
    return jax.lax.platform_dependent(old, cpu=branch, default=select)


def count_skips(
    skips: dict[str, jax.Array], is_finite: jax.Array, is_empty: jax.Array
) -> dict[str, jax.Array]:
    """Returns `TrainState.skips` after a step: finite or not; an empty one changes no count."""
    skipped = 1 - is_finite.astype(jnp.int32)
    counted = {"total": skips["total"] + skipped, "in_row": (skips["in_row"] + 1) * skipped}
    return jax.tree.map(lambda new, old: jnp.where(is_empty, old, new), counted, skips)


def update_ema(average: PyTree, new: PyTree, step: jax.Array, decay: float) -> PyTree:
    """Moves the average towards `new`.

    The decay warms up as `min(decay, (1 + step) / (10 + step))`, so that the first weights are
    forgotten within a few steps (the rule of TensorFlow's ExponentialMovingAverage).
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, n: a + (1.0 - decay) * (n - a), average, new)
