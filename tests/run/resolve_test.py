"""Fields that follow from data, checkpoint and devices."""

import functools
import json

import pytest
from ml_collections.config_dict import placeholder

from tests.run.configs import make_config
from vitcls.errors import UserError
from vitcls.provenance.saved_config import check_same_run, read_saved_config
from vitcls.run.resolve import resolve


def save_config(config, workdir):
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))


def test_resolve_fills_in_what_follows():
    config = make_config("x")
    config.train.update(total_steps=0, total_epochs=2.5)
    resolved = resolve(config, num_train=100, image_size=(8, 8), num_devices=8)
    assert resolved.train.total_steps == 16  # ceil(250 / 16)
    assert resolved.data.image_size == (8, 8)
    assert resolved.eval.batch_size == 16
    assert config.train.total_steps == 0
    config.optim.warmup_steps = 17
    with pytest.raises(UserError, match="more than the 16 steps"):
        resolve(config, num_train=100, image_size=(8, 8), num_devices=8)


def test_what_was_left_open_is_kept_by_a_run_that_is_continued(tmp_path):
    """Also by one of a version that wrote numbers only."""
    config = make_config("x")
    config.train.total_steps = 1000
    config.optim.warmup_steps = config.eval.every_steps = placeholder(int)
    resolved_of = functools.partial(resolve, num_train=100, image_size=(8, 8), num_devices=8)
    old = resolved_of(config)
    assert (old.optim.warmup_steps, old.eval.every_steps) == (100, 100)
    old.optim.warmup_steps, old.eval.every_steps = 77, 33
    del old.optim.restarts
    save_config(old, tmp_path)
    config.train.total_steps = 2000
    resolved = resolved_of(config, saved=read_saved_config(tmp_path / "config.json"))
    assert (resolved.optim.warmup_steps, resolved.eval.every_steps) == (77, 33)
    check_same_run(resolved, tmp_path / "config.json")
    # As a sweep asks, which leaves them open.
    config.data.image_size, config.eval.batch_size = (8, 8), 16
    check_same_run(config, tmp_path / "config.json")


def test_rates_are_scaled_with_the_batch():
    config = make_config("x")
    config.optim.update(lr=0.2, lr_batch_size=64)
    config.adapt.probe_lr = 0.4
    resolved = resolve(config, num_train=100, image_size=(8, 8), num_devices=8)
    assert config.train.global_batch_size == 16
    assert (resolved.optim.lr, resolved.adapt.probe_lr) == (0.05, 0.1)
    again = resolve(resolved, num_train=100, image_size=(8, 8), num_devices=8)
    assert again.optim.lr == 0.05


def test_evaluation_batch_is_rounded_up_to_the_devices():
    config = make_config("x")
    config.eval.batch_size = 100
    resolved = resolve(config, num_train=100, image_size=(8, 8), num_devices=8)
    assert resolved.eval.batch_size == 104
