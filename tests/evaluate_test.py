"""Every image counts exactly once, on any number of devices and at any batch size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls import augment, images, sharding
from vitcls import train_step as steps
from vitcls.data import loader, sources
from vitcls.errors import Interrupted
from vitcls.evaluate import evaluate
from vitcls.models import vit
from vitcls.signals import StopRequest


@pytest.fixture(scope="module")
def model_and_variables():
    model = vit.ViT(vit.vit_config("vit_mu4", num_classes=10, image_size=(8, 8)))
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )
    head = variables["params"]["classifier"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return model, variables


def run(digits_dir, model_and_variables, *, num_devices, batch_size, **kwargs):
    model, variables = model_and_variables
    split = sources.open_split("digits", "test", data_dir=digits_dir)
    mesh = sharding.make_mesh(-1, 1, devices=jax.devices()[:num_devices])
    normalise = functools.partial(
        augment.normalise, rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    eval_step = jax.jit(
        steps.make_eval_step(normalise, model.apply), out_shardings=sharding.replicated(mesh)
    )
    batches = loader.eval_batches(
        split,
        global_batch_size=batch_size,
        transform=functools.partial(images.squash, size=(8, 8), resample="bilinear"),
        num_threads=2,
    )
    metrics, predictions = evaluate(
        eval_step,
        jax.device_put(variables, sharding.replicated(mesh)),
        batches,
        mesh=mesh,
        name="test",
        num_examples=len(split),
        keep_predictions=True,
        **kwargs,
    )
    return metrics, predictions, split.labels()


@pytest.mark.parametrize(("num_devices", "batch_size"), [(3, 48), (8, 128), (8, 360), (1, 1024)])
def test_metrics_do_not_depend_on_devices_or_batches(
    digits_dir, model_and_variables, num_devices, batch_size
):
    one, one_predictions, labels = run(
        digits_dir, model_and_variables, num_devices=1, batch_size=90
    )
    many, predictions, _ = run(
        digits_dir, model_and_variables, num_devices=num_devices, batch_size=batch_size
    )
    assert one["num_examples"] == many["num_examples"] == 360
    for name in one:
        assert many[name] == pytest.approx(one[name], abs=1e-6), name
    np.testing.assert_array_equal(predictions["labels"], labels)
    np.testing.assert_allclose(predictions["logits"], one_predictions["logits"], atol=1e-5)


def test_a_signal_stops_the_pass(digits_dir, model_and_variables):
    stop = StopRequest()
    stop.name = "SIGINT"
    with pytest.raises(Interrupted, match="SIGINT: evaluation of test stopped"):
        run(digits_dir, model_and_variables, num_devices=1, batch_size=90, stop=stop)
