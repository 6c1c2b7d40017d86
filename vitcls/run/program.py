"""The program of a run: its state and its two steps on the devices, made from the config."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vitcls import pretrained
from vitcls.augment import prepare as augment
from vitcls.errors import UserError
from vitcls.models.attention import check_cudnn
from vitcls.pretrained.teacher import Teacher
from vitcls.run.passes import group_size, pass_size
from vitcls.step import adapt, losses, optim, sharding
from vitcls.step import train_step as steps
from vitcls.step.eval_step import make_eval_step, over_mirror_images

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """Functions and shapes; nothing is compiled or placed before it is called.

    Attributes:
      config: What it was made from.
      mesh: The devices.
      state_shapes: A `TrainState` of `jax.ShapeDtypeStruct`.
      state_shardings: A `TrainState` of `jax.sharding.NamedSharding`.
      train_step: Jitted `(state, batch) -> (state, metrics)`; the state's memory is reused.
      eval_step: Jitted `(variables, batch) -> (sums, predictions)`.
      prepare: `(step, batch) -> (images, targets, weights)`, the inputs of network and loss in the
        training step that follows `step` others and takes one pass.
      num_passes: Parts of the batch that a training step takes one after the other.
      pass_size: Images of one part, on each device.
      row: Shapes and dtypes of one image's part of a batch, as the loader makes it.
      init: Returns random variables.
      init_state: Makes a `TrainState`, without a teacher, of variables.
      teacher: Network to distil from, or None.
    """

    config: ConfigDict
    mesh: Mesh
    state_shapes: steps.TrainState
    state_shardings: steps.TrainState
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    prepare: Callable[..., Any]
    num_passes: int
    pass_size: int
    row: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[], PyTree]
    init_state: Callable[[PyTree], steps.TrainState]
    teacher: Teacher | None

    @property
    def teacher_sha256(self) -> str | None:
        """Hash of the teacher's weights; None: no distillation."""
        return None if self.teacher is None else self.teacher.sha256

    def passes_line(self) -> str:
        """Returns how a step takes its batch, for the log."""
        num_rows = self.num_passes * self.pass_size
        return f"A step takes {num_rows} images on each device, {self.pass_size} at a time."

    def batch_shapes(self, num_images: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns what a batch of so many images is, over all devices."""
        split = sharding.batch_sharding(self.mesh)
        return jax.tree.map(
            lambda leaf: leaf.update(shape=(num_images, *leaf.shape), sharding=split), self.row
        )

    def placed_state(self) -> steps.TrainState:
        """Returns a `TrainState` of shapes with their shardings."""
        return sharding.placed(self.state_shapes, self.state_shardings)

    def lower(self) -> jax.stages.Lowered:
        """Returns the training step for the shapes and places with which it is called."""
        batch = self.batch_shapes(self.num_passes * self.pass_size * self.mesh.size)
        return self.train_step.lower(self.placed_state(), batch)

    def lower_eval(self, num_images: int) -> jax.stages.Lowered:
        """Returns the evaluation step for batches of so many images."""
        shapes = jax.eval_shape(steps.TrainState.eval_variables, self.state_shapes)
        placed = sharding.placed(shapes, sharding.state_shardings(shapes, self.mesh))
        return self.eval_step.lower(placed, self.batch_shapes(num_images))

    def first_state(self, variables: PyTree | None) -> steps.TrainState:
        """Returns the state before the first step, on the devices.

        Args:
          variables: The network's, on the host; None: random ones.
        """
        shardings = sharding.state_shardings(jax.eval_shape(self.init), self.mesh)
        if variables is None:
            variables = jax.jit(self.init, out_shardings=shardings)()
        else:
            variables = sharding.put(variables, shardings)
        shardings = self.state_shardings.replace(teacher=None)
        state = jax.jit(self.init_state, donate_argnums=0, out_shardings=shardings)(variables)
        return self.with_teacher(state)

    def with_teacher(self, state: steps.TrainState) -> steps.TrainState:
        """Returns the state with the teacher's variables, if there are any, on the devices."""
        if self.teacher is None:
            return state
        placed = sharding.put(self.teacher.variables, self.state_shardings.teacher)
        return state.replace(teacher=placed)


def make_program(
    config: ConfigDict,
    model_config: pretrained.Config,
    processor: pretrained.Processor,
    mesh: Mesh,
    *,
    class_names: tuple[str, ...],
    class_counts: np.ndarray,
    teacher: Teacher | None = None,
) -> Program:
    """Returns what `config`, with every derived field filled in, trains and evaluates.

    Args:
      config: The run's, as `run.resolve` returns it, with passes chosen (`run.fitting`).
      model_config: The network's.
      processor: How its images are normalised.
      mesh: The devices.
      class_names: The data's.
      class_counts: Training images of each class, int (K,).
      teacher: Network to distil from; None: no distillation.

    Raises:
      UserError: a pattern matches no parameter, an option means nothing to this network, the batch
        cannot be divided into passes of about the size that is asked for.
    """
    model = _make_network(config, model_config, mesh)
    init_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    init = functools.partial(
        model.init, init_key, jnp.zeros((1, *config.data.image_size, 3)), train=False
    )
    # Only shapes are computed: mistakes show, and memory is counted, before anything is placed.
    variable_shapes = jax.eval_shape(init)
    split = functools.partial(_split, config, jax.random.fold_in(init_key, 1))
    trained, frozen = jax.eval_shape(split, variable_shapes["params"])
    tx, schedule = _make_optimizer(config, trained, frozen)
    init_state = functools.partial(
        steps.init_state, tx=tx, split=split, use_ema=config.optim.ema_decay > 0
    )
    state_shapes = jax.eval_shape(init_state, variable_shapes)
    if teacher is not None:
        state_shapes = state_shapes.replace(teacher=jax.eval_shape(lambda: teacher.variables))
    state_shardings = sharding.state_shardings(state_shapes, mesh)
    num_rows, group = config.train.global_batch_size // mesh.size, group_size(config)
    size = pass_size(num_rows, config.train.micro_batch, group_size=group)
    prepare = augment.make_prepare(
        processor.normalise, label_smoothing=config.loss.label_smoothing, **config.augment
    )
    # Augmentation needs no neighbour but that of a pair, so no row leaves its device.
    prepare = sharding.on_each_device(prepare, mesh)

    @jax.jit
    def prepare_step(step: int, batch: steps.Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = steps.image_keys(step_key, step, batch["image"].shape[0])
        return prepare(keys[:, 0], batch)

    train_step = steps.make_train_step(
        prepare,
        _make_loss_fn(config, model.apply, teacher, class_names, class_counts),
        tx,
        key=step_key,
        schedule=schedule,
        ema_decay=config.optim.ema_decay,
        num_passes=num_rows // size,
        group_size=group,
        probe_steps=config.adapt.probe_steps,
    )
    eval_apply = over_mirror_images(model.apply) if config.eval.tta == "flip" else model.apply
    everywhere = sharding.replicated(mesh)
    # The flag --xla_gpu_deterministic_ops would do this for all programs. Other devices ignore it.
    options = {"xla_gpu_deterministic_ops": True} if config.train.deterministic else None
    return Program(
        config=config,
        mesh=mesh,
        state_shapes=state_shapes,
        state_shardings=state_shardings,
        train_step=jax.jit(
            train_step,
            # The new state takes the memory of the old one.
            donate_argnums=0,
            out_shardings=(state_shardings, everywhere),
            compiler_options=options,
        ),
        eval_step=jax.jit(
            make_eval_step(processor.normalise, eval_apply),
            out_shardings=everywhere,
            compiler_options=options,
        ),
        prepare=prepare_step,
        num_passes=num_rows // size,
        pass_size=size,
        row={
            "image": jax.ShapeDtypeStruct((*config.data.image_size, 3), np.uint8),
            "targets": jax.ShapeDtypeStruct((len(class_names),), np.float32),
            "mask": jax.ShapeDtypeStruct((), np.float32),
            "index": jax.ShapeDtypeStruct((), np.int32),
        },
        init=init,
        init_state=init_state,
        teacher=teacher,
    )


def _make_network(config: ConfigDict, model_config: pretrained.Config, mesh: Mesh) -> nn.Module:
    network = pretrained.make_model(
        model_config,
        dtype=jnp.dtype(config.model.dtype),
        dropout_rate=config.model.dropout,
        drop_path_rate=config.model.drop_path,
        patch_dropout_rate=config.model.patch_dropout,
        train_batch_norm=config.model.batch_norm == "train",
        attention=config.model.attention,
        remat=config.model.remat,
    )
    if config.model.attention == "cudnn":
        check_cudnn(mesh.devices.flat[0], config.model.dtype)
    return network


def _make_loss_fn(
    config: ConfigDict,
    apply: Callable[..., Any],
    teacher: Teacher | None,
    class_names: tuple[str, ...],
    class_counts: np.ndarray,
) -> Callable[..., Any]:
    """Returns the loss of a pass, with or without a teacher."""
    fields, distil = config.loss, None
    if teacher is not None:
        distil = steps.make_distil(
            teacher.logits, weight=fields.teacher_weight, temperature=fields.temperature
        )
    return steps.make_loss_fn(
        adapt.with_lora(apply) if config.adapt.lora_rank else apply,
        losses.make_loss(
            fields.name,
            gamma=fields.gamma,
            logit_adjustment=fields.logit_adjustment,
            class_counts=class_counts,
        ),
        losses.class_weights(fields.class_weights, class_names, class_counts, beta=fields.beta),
        distil,
        may_skip=config.data.on_error == "skip",
    )


def _split(config: ConfigDict, key: jax.Array, params: PyTree) -> tuple[PyTree, PyTree]:
    """Divides the network's parameters into (trained, frozen); `key` samples LoRA's."""
    fields = config.adapt
    train = fields.train or ("head" if fields.lora_rank else "all")
    trained, frozen = adapt.split(params, fields.freeze, train=train)
    if not fields.lora_rank:
        return trained, frozen
    return adapt.add_lora(
        trained,
        frozen,
        key,
        rank=fields.lora_rank,
        alpha=fields.lora_rank if fields.lora_alpha is None else fields.lora_alpha,
        targets=fields.lora_targets,
    )


def _make_optimizer(
    config: ConfigDict, trained: PyTree, frozen: PyTree
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer for parameters of these shapes, and its learning rate by step."""
    fields, probe_steps = config.optim, config.adapt.probe_steps
    probe_schedule, schedule = _make_schedules(config)
    alpha = config.adapt.l2_sp
    beta = config.adapt.l2_sp_head if config.model.head == "new" else alpha
    make = functools.partial(
        optim.make_optimizer,
        fields.name,
        params=trained,
        weight_decay=fields.weight_decay,
        decay=fields.decay,
        clip_norm=fields.clip_norm,
        args=dict(fields.args),
        lr_factors=adapt.lr_factors(
            trained,
            frozen,
            lr_scale=config.adapt.lr_scale,
            layer_decay=config.adapt.layer_decay,
        ),
        l2_sp=optim.L2SP(alpha, beta) if alpha else None,
    )
    if not probe_steps:
        return make(schedule), schedule
    if not any(re.fullmatch(adapt.HEAD, name) for name in adapt.names(trained)):
        raise UserError(
            f"adapt.probe_steps={probe_steps} trains the head alone, which adapt.freeze="
            f"{config.adapt.freeze!r} keeps as it is; change one of the two."
        )
    tx = optim.probe_first(make(probe_schedule), make(schedule), num_steps=probe_steps)
    return tx, learning_rate(config)


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate by step, the probe's before that of what follows."""
    probe_schedule, schedule = _make_schedules(config)
    if not config.adapt.probe_steps:
        return schedule
    return optax.join_schedules([probe_schedule, schedule], [config.adapt.probe_steps])


def _make_schedules(config: ConfigDict) -> tuple[optax.Schedule, optax.Schedule]:
    """Returns the rate of the probe, and that of what follows by step after the probe."""
    fields, probe_steps = config.optim, config.adapt.probe_steps
    probe_lr = fields.lr if config.adapt.probe_lr is None else config.adapt.probe_lr
    return optax.constant_schedule(probe_lr), optim.make_schedule(
        fields.schedule,
        lr=fields.lr,
        warmup_steps=fields.warmup_steps,
        total_steps=config.train.total_steps - probe_steps,
        restarts=[step - probe_steps for step in fields.restarts],
    )


def with_fields(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
    """Returns a copy with other values of some `group.field`."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(values)
    return config
