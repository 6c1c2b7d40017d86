"""The training step, made of plain callables: no I/O, no config.

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
    """All that training changes, and what it keeps: frozen parameters and the teacher.

    Attributes:
      step: int32 (), the number of finished steps.
      params: The trained parameters.
      frozen: The parameters that stay. `adapt.merge(params, frozen)` are all parameters.
      batch_stats: Running statistics of BatchNorm; empty without it.
      opt_state: State of the optimizer.
      ema: Moving averages of `params` and `batch_stats`, or None.
      skips: int32 () each, numbers of steps that changed nothing because loss or gradient were not
        finite: `total`, and `in_row`, those since the last finite step.
      num_empty: int32 (), number of steps that changed nothing because no image of their batch
        counted.
      teacher: Variables of the network to distil from, or None; not part of a checkpoint.
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
        """The variables, with moving averages in place of what they average, if any."""
        if self.ema is None:
            return self.variables()
        return _variables(self.ema["params"], self.frozen, self.ema["batch_stats"])

    def eval_variables(self) -> PyTree:
        """The variables to evaluate and export: the averages, with LoRA folded in."""
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
    """Returns the state before the first step; `split` is parameters -> (trained, frozen)."""
    params, frozen = split(variables["params"])
    batch_stats = variables.get("batch_stats", {})
    # The averages start as copies of the weights. The step donates both, so they must not share
    # memory.
    averaged = {"params": params, "batch_stats": batch_stats}
    ema = jax.tree.map(jnp.copy, averaged) if use_ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        ema=ema,
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
      apply: A flax module's `apply`. A network with BatchNorm returns its statistics as the mutable
        collection `batch_stats`, and takes a `mask`, see `resnet.ResNet`.
      loss: The loss of each image.
      class_weights: (K,) factors of an image's weight; a dense target averages them. None: all 1.
      distil: `(teacher, images, logits, loss (B,)) -> loss (B,)`, see `make_distil`; None: no
        distillation.
      may_skip: Whether images may have weight 0 because they were skipped.
    """

    def loss_fn(params, fixed, batch_stats, images, targets, weights, keys):
        frozen, teacher = fixed
        options = {}
        # Without skipped images BatchNorm needs no mask, which is a tenth faster on CPU.
        if batch_stats and may_skip:
            is_image = weights > 0
            has_images = jnp.any(is_image)
            # The mean over no image is not finite, and 0 times its gradient is not 0. So a pass
            # without images is normalised by its black rows, which have no loss.
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
    """Returns the function that mixes `losses.distillation` into the loss of each image.

    Args:
      teacher_logits: `(teacher's variables, images) -> logits (B, K)`.
      weight: Share of the teacher, from 0 to 1; the rest is the loss against the labels.
      temperature: See `losses.distillation`.
    """

    # The teacher sees the same augmented and mixed images as the network (Beyer et al. 2021,
    # arXiv:2106.05237).
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
    """Returns two keys per image, (B, 2): one for `prepare`, one for the network."""
    return jax.vmap(lambda k: jax.random.split(k, 2))(sample_keys(key, step, batch_size))


def in_passes(
    grad_fn: Callable[..., Any], num_passes: int, *, group_size: int = 1
) -> Callable[..., Any]:
    """Computes a sum over a batch, and its gradient, in several passes over parts of the batch.

    The memory is that of one pass. BatchNorm normalises each pass by itself, and moves its running
    statistics in each. Nothing else depends on the number of passes.

    Args:
      grad_fn: `(params, fixed, batch_stats, *arrays (B, ...)) -> (loss sum, (weight sum,
        batch_stats)), gradient of the loss sum`.
      num_passes: A, a divisor of the groups on one device.
      group_size: Number of neighbours that stay together because they are mixed.
    """
    if num_passes == 1:
        return grad_fn

    # Pass a takes the rows (or groups) a, a + A, a + 2 A, ..., so that every device divides the
    # rows that it already has.
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

    The metrics are `loss`, `grad_norm` (of the mean loss, before clipping), `lr` (by `schedule`,
    which `tx` follows), `is_empty` (whether no image counts), and the new state's `skips`. For
    `num_passes` and `group_size` see `in_passes`. The first `probe_steps` train the head only.

    A step changes only the counts of steps if its loss or gradient norm is not finite, or if no
    image counts.
    """

    def batch_loss(params, fixed, batch_stats, batch, keys):
        images, targets, weights = prepare(keys[:, 0], batch)
        return loss_fn(params, fixed, batch_stats, images, targets, weights, keys[:, 1])

    def probe_loss(params, *rest):
        return batch_loss(adapt.hold_backbone(params), *rest)

    # Sums are divided once at the end, so that the mean does not depend on the split of a batch.
    grad_fn, probe_grad_fn = (
        in_passes(jax.value_and_grad(loss, has_aux=True), num_passes, group_size=group_size)
        for loss in (batch_loss, probe_loss)
    )

    def train_step(state, batch):
        keys = image_keys(key, state.step, batch["image"].shape[0])
        inputs = (state.params, (state.frozen, state.teacher), state.batch_stats, batch, keys)
        # Skipped steps do not count, because `tx` does not see them.
        num_updates = state.step - state.skips["total"] - state.num_empty
        # Only one branch is executed, so that probing does not pay for the backbone's gradient.
        if probe_steps:
            result = jax.lax.cond(num_updates < probe_steps, probe_grad_fn, grad_fn, *inputs)
        else:
            result = grad_fn(*inputs)
        (loss_sum, (weight_sum, batch_stats)), grads = result
        # No image counts if all are skipped or of classes with weight 0. Then 0 / 0 must not occur.
        is_empty = weight_sum == 0
        weight_sum = jnp.where(is_empty, 1.0, weight_sum)
        grads = jax.tree.map(lambda g: g / weight_sum, grads)
        loss, grad_norm = loss_sum / weight_sum, optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        skips = count_skips(state.skips, is_finite, is_empty)
        step_metrics = {"loss": loss, "grad_norm": grad_norm, "lr": schedule(num_updates)}
        step_metrics |= {"is_empty": is_empty, "skips": skips}

        def update(old):
            updates, opt_state = tx.update(grads, old["opt_state"], old["params"])
            params = optax.apply_updates(old["params"], updates)
            averaged = {"params": params, "batch_stats": batch_stats}
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

    # On CPU a branch updates in place. A selection would read the optimizer's moments once more,
    # and XLA would copy them first. On a GPU a branch would make the host wait for its condition.
    return jax.lax.platform_dependent(old, cpu=branch, default=select)


def count_skips(
    skips: dict[str, jax.Array], is_finite: jax.Array, is_empty: jax.Array
) -> dict[str, jax.Array]:
    """Returns `TrainState.skips` after a step. An empty step changes no count."""
    skipped = 1 - is_finite.astype(jnp.int32)
    counted = {"total": skips["total"] + skipped, "in_row": (skips["in_row"] + 1) * skipped}
    return jax.tree.map(lambda new, old: jnp.where(is_empty, old, new), counted, skips)


def update_ema(average: PyTree, new: PyTree, step: jax.Array, decay: float) -> PyTree:
    """Moves the average towards `new`.

    The decay warms up as `min(decay, (1 + step) / (10 + step))`, the rule of TensorFlow's
    ExponentialMovingAverage.
    """
    # With the warm-up, the first weights are forgotten within a few steps.
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, n: a + (1.0 - decay) * (n - a), average, new)
