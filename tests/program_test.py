"""How a device's rows are divided into passes, and with which options programs are compiled."""

import jax
import numpy as np
import pytest

from vitcls import program, sharding, train_setup
from vitcls.config import default_config
from vitcls.errors import UserError


@pytest.mark.parametrize(
    ("num_rows", "micro_batch", "size"),
    [(128, None, 128), (128, 32, 32), (128, 128, 128), (16, 32, 16), (48, 32, 24), (61, 61, 61),
     (6, 1, 1), (100, 30, 25)],
)  # fmt: skip
def test_passes_are_equal_and_not_above_what_is_asked_for(num_rows, micro_batch, size):
    assert program._pass_size(num_rows, micro_batch) == size


def test_passes_hold_pairs_together_where_they_are_mixed():
    assert program._pass_size(60, 31, group_size=2) == 30
    assert program._pass_size(30, 15, group_size=2) == 10
    for num_rows, micro_batch in [(61, None), (60, 1)]:
        with pytest.raises(UserError, match="augment.mixup and augment.cutmix mix pairs, which"):
            program._pass_size(num_rows, micro_batch, group_size=2)


@pytest.mark.parametrize(("num_rows", "micro_batch"), [(61, 32), (122, 48), (101, 100)])
def test_passes_far_below_what_is_asked_for_are_refused(num_rows, micro_batch):
    with pytest.raises(UserError, match=f"the {num_rows} images that each device"):
        program._pass_size(num_rows, micro_batch)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_compiler_of_both_steps(monkeypatch, deterministic):
    config = default_config()
    config.data.update(source="digits", image_size=(8, 8))
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=1, global_batch_size=8, deterministic=deterministic)
    names = ("a", "b")
    _, model_config, processor = train_setup.open_model(config, names, begun=None)
    jit, options = jax.jit, {}

    def recorded(function, **kwargs):
        options[getattr(function, "__name__", "")] = kwargs.get("compiler_options")
        return jit(function, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(program.jax, "jit", recorded)
        made = program.make_program(
            config, model_config, processor, sharding.make_mesh(1, 1, devices=jax.devices()[:1]),
            class_names=names, class_counts=np.array([1, 1]),
        )  # fmt: skip
    asked = {"xla_gpu_deterministic_ops": True} if deterministic else None
    assert options["train_step"] == options["eval_step"] == asked
    # A CPU accepts the option; a name that the compiler does not know would be an error.
    batch = {
        "image": np.zeros((8, 8, 8, 3), np.uint8),
        "targets": np.zeros((8, 2), np.float32),
        "mask": np.zeros(8, np.float32),
        "index": np.zeros(8, np.int32),
    }
    made.eval_step.lower(jax.eval_shape(made.init), batch).compile()
