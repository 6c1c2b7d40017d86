"""The config files for real work: valid for every data set, from any folder."""

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from vitcls import cli, recipes
from vitcls.config.checks import check_config
from vitcls.errors import UserError
from vitcls.run import program
from vitcls.run.resolve import resolve
from vitcls.step.optim import check_args

ROOT = Path(__file__).parent.parent
NAMES = ["resnet50", "vit_b16", "vit_b32", "vit_l16", "vit_s16"]


def get_config(name: str, arg: str):
    return runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](arg)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", [*recipes.SCHEDULES, "folder:my/images", "tfds:beans"])
def test_every_recipe_is_valid_for_every_data_set(name, source):
    config = get_config(name, f"data={source}")
    check_config(config)
    check_args(config.optim.name, dict(config.optim.args))
    schedule = recipes.SCHEDULES.get(source, recipes.OTHER)
    assert config.data.source == source
    assert config.data.eval_splits == (schedule.eval_split,)
    assert (config.train.total_steps, config.optim.lr) == (schedule.total_steps, schedule.lr)


# Steps, training images, warm-up and evaluation interval. The first five are cited: those of
# google-research/vision_transformer's README, and big_vision's configs/transfer.py for Pets.
LENGTHS = [
    ("tfds:cifar10", 10_000, 49_000, 500, 1_000),
    ("tfds:cifar10", 500, 49_000, 50, 50),
    ("tfds:cifar10", 1_000, 49_000, 100, 100),
    ("tfds:imagenet2012", 20_000, 1_268_355, 500, 2_000),
    ("tfds:oxford_iiit_pet", 500, 3_312, 100, 50),
    ("folder:my/images", 200, 1_000, 40, 50),
    ("folder:my/images", 10, 1_000, 2, 50),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("source", "total_steps", "num_train", "warmup", "every"), LENGTHS)
def test_warm_up_and_evaluations_follow_the_steps(
    name, source, total_steps, num_train, warmup, every
):
    config = get_config(name, f"data={source}")
    config.train.total_steps = total_steps
    resolved_of = functools.partial(
        resolve, num_train=num_train, image_size=(384, 384), num_devices=1
    )
    check_config(config)
    resolved = resolved_of(config)
    assert (resolved.optim.warmup_steps, resolved.eval.every_steps) == (warmup, every)
    rate = program.learning_rate(resolved)
    assert float(rate(warmup)) == pytest.approx(config.optim.lr)
    assert float(rate(total_steps)) == pytest.approx(0, abs=1e-6)
    config.train.update(total_steps=0, total_epochs=total_steps * 512 / num_train)
    check_config(config)
    assert resolved_of(config).to_dict() == resolved.to_dict()
    config.optim.warmup_steps = 1
    config.eval.every_steps = 7
    resolved = resolved_of(config)
    assert (resolved.optim.warmup_steps, resolved.eval.every_steps) == (1, 7)


@pytest.mark.parametrize("name", ["quickstart:", "vit_b16:data=tfds:cifar10", "pretrain_glyphs"])
@pytest.mark.parametrize(
    "override",
    ["eval.select_split=", "data.crop=none", "data.fold=1/5", "data.source=folder:x"],
)
def test_what_an_override_makes_void_in_a_recipe_is_at_its_default(name, override, monkeypatch):
    def read(*overrides):
        flag_values = flags.FlagValues()
        monkeypatch.setattr(cli, "FLAGS", flag_values)
        argv = ["x", f"--config={ROOT}/configs/{name.replace(':', '.py:', 1)}", *overrides]
        argv[1] += "" if ":" in name else ".py"
        holder = config_flags.DEFINE_config_file(
            "config", lock_config=False, flag_values=flag_values, sys_argv=argv
        )
        flag_values(argv)
        return cli.config_value(holder)

    check_config(read(f"--config.{override}"))
    with pytest.raises(UserError, match="data.crop_scale=.* has no effect"):
        check_config(read("--config.data.crop=none", "--config.data.crop_scale=(0.3,1.0)"))


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_what_is_published_and_list_the_data_sets(name):
    text = (ROOT / f"configs/{name}.py").read_text().split('"""')[1]
    assert "not measured here" in text and f"--config=configs/{name}.py:data=" in text
    assert all(source in text for source in (*recipes.SCHEDULES, "folder:PATH"))


def test_data_must_be_named():
    with pytest.raises(UserError, match="data.source is empty"):
        check_config(get_config("vit_b16", ""))
    with pytest.raises(UserError, match="Did you mean 'data'?"):
        get_config("vit_b16", "dta=tfds:cifar10")


def test_recipes_run_from_any_folder(tmp_path):
    """As far as the folder of images, which is not there."""
    result = subprocess.run(
        [
            sys.executable, "-m", "vitcls.main", "--workdir=run",
            f"--config={ROOT}/configs/vit_b16.py:data=folder:no/images",
        ],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 2
    assert f"data.source: {tmp_path}/no/images does not exist." in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
