"""What the optimizer is made of, how steps are compiled, where the state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.run import network, program
from vitcls.step import adapt, sharding


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_compiler_of_both_steps(monkeypatch, deterministic):
    config = default_config()
    config.data.update(source="digits", image_size=(8, 8))
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=1, global_batch_size=8, deterministic=deterministic)
    names = ("a", "b")
    _, model_config, processor = network.open_model(config, names)
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


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_skipped_images_are_looked_for_where_there_can_be_some(monkeypatch, on_error):
    config = default_config()
    config.data.update(source="digits", image_size=(32, 32), on_error=on_error)
    config.model.arch = "resnet_mu"
    config.train.update(total_steps=1, global_batch_size=8)
    _, model_config, processor = network.open_model(config, ("a", "b"))
    made, make_loss_fn = [], program.steps.make_loss_fn
    with monkeypatch.context() as patch:
        patch.setattr(
            program.steps,
            "make_loss_fn",
            lambda *args, **options: made.append(options) or make_loss_fn(*args, **options),
        )
        program.make_program(
            config, model_config, processor, sharding.make_mesh(1, 1, devices=jax.devices()[:1]),
            class_names=("a", "b"), class_counts=np.array([1, 1]),
        )  # fmt: skip
    assert made == [{"may_skip": on_error == "skip"}]


def probe_config():
    config = default_config()
    config.train.total_steps = 20
    config.optim.update(name="sgd", lr=1.0, warmup_steps=4, clip_norm=0.0)
    config.adapt.update(probe_steps=5, probe_lr=0.5)
    return config


PARAMS = {
    "encoder": {"layer_0": {"kernel": jnp.ones((2, 2))}},
    "classifier": {"kernel": jnp.ones((2, 2))},
}


def test_a_probe_has_its_own_rate_and_what_follows_the_whole_schedule():
    """Warm-up from 0 after the probe, and down to 0 at the last step; updates follow the rate."""
    config = probe_config()
    tx, schedule = program._make_optimizer(config, PARAMS, {})
    rates = np.array([float(schedule(step)) for step in range(21)])
    np.testing.assert_allclose(rates[:9], [0.5] * 5 + [0, 0.25, 0.5, 0.75], atol=1e-6)
    np.testing.assert_allclose(rates[[9, 20]], [1, 0], atol=1e-6)
    state = tx.init(PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    update = jax.jit(tx.update)
    for step in range(20):
        updates, state = update(grads, state, PARAMS)
        np.testing.assert_allclose(updates["classifier"]["kernel"], -rates[step], atol=1e-6)
        held = 0 if step < 5 else -rates[step]
        np.testing.assert_allclose(updates["encoder"]["layer_0"]["kernel"], held, atol=1e-6)
    config.adapt.probe_lr = None
    assert float(program._make_optimizer(config, PARAMS, {})[1](0)) == config.optim.lr


def test_a_probe_without_a_head_to_train_is_refused():
    config = probe_config()
    config.adapt.freeze = "classifier/.*"
    message = "adapt.probe_steps=5 trains the head alone, which adapt.freeze='classifier/"
    with pytest.raises(UserError, match=message):
        program._make_optimizer(config, *adapt.split(PARAMS, "classifier/.*"))


def test_lora_trains_the_head_along_and_scales_by_1_unless_told():
    config = default_config()
    config.adapt.update(lora_rank=4, lora_targets="encoder/.*/kernel")
    for alpha, scale in ((None, 1), (8.0, 2)):
        config.adapt.lora_alpha = alpha
        trained, frozen = program._split(config, jax.random.key(0), PARAMS)
        layer = "encoder/layer_0"
        assert set(adapt.names(trained)) == {
            f"{layer}/lora_a", f"{layer}/lora_b", "classifier/kernel"
        }  # fmt: skip
        assert frozen["encoder"]["layer_0"]["lora_scale"] == scale
    config.adapt.train = "all"
    with pytest.raises(UserError, match="which is trained itself"):
        program._split(config, jax.random.key(0), PARAMS)


@pytest.mark.parametrize(("head", "rate"), [("new", 0.5), ("keep", 0.25)])
def test_l2_sp_has_a_rate_of_its_own_for_a_new_head_only(head, rate):
    config = default_config()
    config.model.head = head
    config.train.total_steps = 2
    config.optim.update(name="sgd", lr=1.0, schedule="constant", clip_norm=0.0)
    config.adapt.update(l2_sp=0.25, l2_sp_head=0.5)
    tx, _ = program._make_optimizer(config, PARAMS, {})
    moved = jax.tree.map(lambda x: x + 1, PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), moved)
    np.testing.assert_allclose(updates["encoder"]["layer_0"]["kernel"], -0.25)
    np.testing.assert_allclose(updates["classifier"]["kernel"], -rate)
