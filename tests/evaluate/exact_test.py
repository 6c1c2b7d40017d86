"""Every image counts exactly once, on any number of devices and at any batch size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.augment import prepare
from vitcls.data import images, loader, sources
from vitcls.data.skipped import Skipped
from vitcls.errors import Interrupted
from vitcls.evaluate.exact import evaluate
from vitcls.models import vit, vit_config
from vitcls.step import sharding
from vitcls.step.eval_step import make_eval_step, over_mirror_images


@pytest.fixture(scope="module")
def model_and_variables():
    model = vit.ViT(vit_config.vit_config("vit_mu4", num_classes=10, image_size=(8, 8)))
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )
    head = variables["params"]["classifier"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return model, variables


def run(
    digits_dir,
    model_and_variables,
    *,
    num_devices,
    batch_size,
    skipped=None,
    change=lambda split: split,
    **kwargs,
):
    model, variables = model_and_variables
    split = change(sources.open_split("digits", "test", data_dir=digits_dir))
    mesh = sharding.make_mesh(-1, 1, devices=jax.devices()[:num_devices])
    normalise = functools.partial(
        prepare.normalise, rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    eval_step = jax.jit(
        make_eval_step(normalise, model.apply), out_shardings=sharding.replicated(mesh)
    )
    batches = loader.eval_batches(
        split,
        global_batch_size=batch_size,
        transform=functools.partial(images.squash, size=(8, 8), resample="bilinear"),
        num_threads=2,
        skipped=skipped,
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
    assert eval_step._cache_size() == 1  # the last batch, which is not full, too
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


def test_mirror_images_are_averaged_with_the_images(model_and_variables):
    model, variables = model_and_variables
    pixels = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
    apply = jax.jit(functools.partial(model.apply, train=False))
    plain = [apply(variables, x) for x in (pixels, pixels[:, :, ::-1])]
    both = jax.jit(functools.partial(over_mirror_images(model.apply), train=False))
    averaged = both(variables, pixels)
    np.testing.assert_allclose(averaged, (plain[0] + plain[1]) / 2, atol=1e-5)
    assert np.abs(plain[0] - plain[1]).max() > 0.1
    mirrored = both(variables, pixels[:, :, ::-1])
    np.testing.assert_allclose(mirrored, averaged, atol=1e-5)


class Damaged(sources.Subset):
    """The whole of a split, in which every seventh image is empty."""

    def read(self, index):
        data, label = super().read(index)
        return (data if index % 7 else b""), label

    image = sources.Split.image  # of what `read` returns, not of the parent's


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 7), (8, 128)])
def test_skipped_images_are_counted_and_the_rest_evaluated(
    digits_dir, model_and_variables, tmp_path, num_devices, batch_size
):
    good = np.flatnonzero(np.arange(360) % 7)
    expected, expected_predictions, _ = run(
        digits_dir, model_and_variables, num_devices=1, batch_size=90,
        change=lambda split: sources.Subset("test", split, indices=good),
    )  # fmt: skip
    skipped = Skipped(tmp_path / "skipped.jsonl")
    metrics, predictions, _ = run(
        digits_dir, model_and_variables, num_devices=num_devices, batch_size=batch_size,
        change=lambda split: Damaged("test", split, indices=np.arange(360)), skipped=skipped,
    )  # fmt: skip
    assert (metrics.pop("num_skipped"), metrics["num_examples"]) == (52, 308)
    assert expected.pop("num_skipped") == 0
    assert metrics == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(predictions["index"], good)
    np.testing.assert_array_equal(predictions["labels"], expected_predictions["labels"])
    np.testing.assert_allclose(predictions["logits"], expected_predictions["logits"], atol=1e-5)
    assert skipped.count("test") == 52


def test_lost_or_repeated_rows_are_a_bug(digits_dir, model_and_variables, monkeypatch):
    iterate = loader.EvalBatches.__iter__
    options = dict(num_devices=1, batch_size=90)
    for broken in (lambda batches: batches[1:], lambda batches: [batches[0], *batches[:3]]):
        monkeypatch.setattr(
            loader.EvalBatches, "__iter__", lambda self, f=broken: iter(f(list(iterate(self))))
        )
        with pytest.raises(AssertionError, match="test"):
            run(digits_dir, model_and_variables, **options)


def test_a_signal_stops_the_pass(digits_dir, model_and_variables):
    calls = []

    def after_batch():
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted("enough")

    with pytest.raises(Interrupted, match="enough"):
        run(
            digits_dir,
            model_and_variables,
            num_devices=1,
            batch_size=90,
            after_batch=after_batch,
        )
    assert len(calls) == 2  # of 4
