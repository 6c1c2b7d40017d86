"""Batches suit the number of images and fit into the memory that there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls import inference
from vitcls.costs import footprint
from vitcls.errors import NonFiniteLoss, NotFinite
from vitcls.step import sharding
from vitcls.step.eval_step import probabilities

ROW = {"image": jax.ShapeDtypeStruct((16,), np.float32)}
VARIABLES = np.ones((16, 1000), np.float32)


@jax.jit
def step(variables, batch):
    return jnp.sin(batch["image"] @ variables)


def compile_step(num_devices=8, **kwargs):
    mesh = sharding.make_mesh(-1, 1, devices=jax.devices()[:num_devices])
    variables = jax.device_put(VARIABLES, sharding.replicated(mesh))
    compiled, batch_size = inference.compile_step(step, variables, ROW, mesh=mesh, **kwargs)
    batch = sharding.to_global({"image": np.ones((batch_size, 16), np.float32)}, mesh)
    np.testing.assert_allclose(compiled(variables, batch), np.sin(16.0), rtol=1e-5)
    return batch_size


@pytest.mark.parametrize(
    ("max_size", "expected"),
    [(256, 64), (100, 50), (64, 64), (7, 7)],
)
def test_what_does_not_fit_is_halved(max_size, expected):
    # 80 % of 9 000 bytes hold 72 images of 100 bytes.
    assert inference.fitting_size(max_size, lambda size: 100 * size, available=9000) == expected


def test_one_image_is_always_tried():
    assert inference.fitting_size(256, lambda size: np.inf, available=0) == 1


@pytest.mark.parametrize(
    ("num_devices", "num_images", "expected"),
    [(1, 1, 1), (1, 32, 32), (1, 33, 17), (1, 1000, 32), (8, 1, 8), (8, 260, 136), (8, 9999, 256)],
)
def test_batches_are_equal_and_little_is_computed_in_vain(num_devices, num_images, expected):
    assert compile_step(num_devices, num_images=num_images) == expected


def test_a_batch_size_that_is_asked_for_is_divided_by_the_devices():
    assert compile_step(num_images=5, batch_size=20) == 24


def test_memory_decides(monkeypatch):
    # Of an image 4 000 bytes of results and 64 of pixels: 12 of them, and half the variables.
    monkeypatch.setattr(footprint, "available_memory", lambda: 8 * 12 * 4064 / 0.8)
    assert compile_step(num_images=9999) == 8 * 8


def test_a_compiler_that_refuses_is_asked_for_less():
    class Picky:
        """Fails as TPU's compiler does."""

        def lower(self, variables, batch):
            if batch["image"].shape[0] > 20:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")
            return step.lower(variables, batch)

    mesh = sharding.make_mesh(-1, 1)
    variables = jax.device_put(VARIABLES, sharding.replicated(mesh))
    _, size = inference.compile_step(Picky(), variables, ROW, mesh=mesh, num_images=9999)
    assert size == 16


@pytest.mark.parametrize("error", [NotFinite, NonFiniteLoss])
def test_answers_that_are_not_finite_are_named_by_their_images(error):
    answers = np.zeros((9, 2, 3), np.float32)
    inference.check_answers(answers, str, error=error)
    inference.check_answers(answers[:0], str, error=error)
    for row, value in zip((1, 2, 4, 6, 7, 8), (np.nan, np.inf, -np.inf) * 2, strict=True):
        answers[row, 1, 2] = value
    with pytest.raises(error, match=r"to 6 of 9 images are not finite: 1, 2, 4, 6, 7, \.\.\.\. It"):
        inference.check_answers(answers, str, error=error)


def test_no_probability_is_made_of_logits_that_are_not_finite():
    logits = np.array([[0, 1], [-np.inf, 1], [np.inf, 1], [np.nan, 1]], np.float32)
    found = np.asarray(probabilities(logits))
    np.testing.assert_allclose(found[0], [1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-6)
    assert np.isnan(found[1:]).all()
