"""Distillation: the loss against torch's, what a teacher sees, and runs that have one."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from torch.nn import functional

from vitcls import pretrained, train
from vitcls.config.fields import default_config
from vitcls.errors import UserError
from vitcls.models import vit_config
from vitcls.pretrained.teacher import open_teacher
from vitcls.step import losses
from vitcls.step import train_step as steps

CLASSES = tuple("abc")
ONE = jax.devices()[:1]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_torchs_divergence(temperature):
    logits, teacher = np.random.default_rng(0).normal(0, 3, (2, 16, 5)).astype(np.float32)
    expected = temperature**2 * functional.kl_div(
        torch.tensor(logits / temperature).log_softmax(-1),
        torch.tensor(teacher / temperature).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    got = losses.distillation(logits, teacher, temperature=temperature)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    same = losses.distillation(teacher, teacher, temperature=temperature)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def save_network(
    folder: Path, names: tuple[str, ...], *, seed: int, processor: pretrained.Processor
) -> Path:
    """A random network, its head too, on images of 8 x 8 pixels."""
    config = vit_config.vit_config("vit_mu4", num_classes=len(names), image_size=(8, 8))
    model, rng = pretrained.make_model(config), np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)),
    )
    id2label = dict(enumerate(names))
    pretrained.save(folder, model, variables, dataclasses.replace(processor, id2label=id2label))
    return folder


PLAIN = pretrained.Processor(size=(8, 8))
OTHER = pretrained.Processor(
    size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), rescale=1 / 200
)


def test_a_teacher_sees_its_own_pixels_and_says_the_students_classes(tmp_path):
    folder = save_network(tmp_path / "teacher", ("c", "x", "a", "b"), seed=0, processor=OTHER)
    student = dataclasses.replace(PLAIN, id2label=dict(enumerate(CLASSES)))
    teacher = open_teacher(str(folder), student)
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)
    model, variables, processor = pretrained.load(folder)
    expected = model.apply(variables, processor(list(images)), train=False)[:, [2, 3, 0]]
    got = teacher.logits(teacher.variables, student.normalise(images))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_with_other_classes_is_refused(tmp_path):
    folder = save_network(tmp_path / "teacher", ("c", "x"), seed=0, processor=PLAIN)
    student = dataclasses.replace(PLAIN, id2label=dict(enumerate(CLASSES)))
    with pytest.raises(UserError, match="loss.teacher=.* has other classes: 2 of") as error:
        open_teacher(str(folder), student)
    assert "the data has 3 ('a', 'b', 'c'); the checkpoint has 2 ('c', 'x')" in str(error.value)
    # vitcls.main has no --labels.
    assert str(error.value).endswith("under the same names.") and "--" not in str(error.value)


def test_its_share_of_the_loss_and_no_gradient_where_both_agree(tmp_path):
    folder = save_network(tmp_path / "teacher", CLASSES, seed=0, processor=PLAIN)
    model, variables, processor = pretrained.load(folder)
    teacher = open_teacher(str(folder), processor)
    images = processor.normalise(np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8))
    targets, weights = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]], np.float32([1, 1, 0, 1])

    @jax.jit
    def loss(params, share):
        distil = steps.make_distil(teacher.logits, weight=share, temperature=2.0)
        loss_fn = steps.make_loss_fn(model.apply, distil=distil)
        fixed = ({}, teacher.variables)
        return loss_fn(params, fixed, {}, images, targets, weights, None)[0]

    plain, grads = jax.value_and_grad(loss)(variables["params"], 1.0)
    assert float(plain) == pytest.approx(0, abs=1e-5)
    assert max(float(abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5
    whole = float(loss(variables["params"], 0.0))
    assert whole > 0.1
    assert float(loss(variables["params"], 0.25)) == pytest.approx(0.75 * whole, rel=1e-5)


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    """A run on a folder of random images, taught by a random network, in two passes per step."""
    rng = np.random.default_rng(0)
    for split, number in [("train", 32), ("test", 8)]:
        for index in range(number):
            path = tmp_path / "data" / split / CLASSES[index % 3] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    config = default_config()
    config.data.update(source=f"folder:{tmp_path / 'data'}", image_size=(8, 8), num_threads=2)
    config.model.arch = "vit_mu4"
    folder = save_network(tmp_path / "teacher", CLASSES[::-1], seed=0, processor=OTHER)
    config.loss.update(teacher=str(folder), teacher_weight=1.0, temperature=2.0)
    config.train.update(total_steps=2, global_batch_size=16, micro_batch=8)
    config.eval.select_split = ""
    return config


def test_a_run_with_a_teacher_goes_on_with_the_same_one_only(config, tmp_path):
    run = functools.partial(train.train_and_evaluate, workdir=tmp_path / "run", devices=ONE)
    run(config)
    teacher, kept = Path(config.loss.teacher), tmp_path / "kept"
    teacher.rename(kept)
    save_network(teacher, CLASSES[::-1], seed=1, processor=OTHER)
    config.train.total_steps = 3
    with pytest.raises(UserError, match="loss.teacher has other weights than when this run began"):
        run(config)
    shutil.rmtree(teacher)
    kept.rename(teacher)
    assert run(config)["step"] == 3
    # A checkpoint is the student alone.
    model, variables, _ = pretrained.load(tmp_path / "run")
    assert set(variables) == {"params"} and model.config.num_classes == 3
