"""Plans for the eight devices of the tests, and the messages of those that cannot be made."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vitcls.config.fields import default_config
from vitcls.costs import chips, footprint
from vitcls.errors import UserError
from vitcls.plan import planning, slices
from vitcls.plan.choices import Choice
from vitcls.plan.table import format_plan
from vitcls.run.program import with_fields
from vitcls.step import sharding

ROOT = Path(__file__).parents[2]
CHIP = next(chip for chip in chips.CHIPS if chip.name == "H100")
NUM_CLASSES = 10


def plans(*, usable=1e12, num_classes=NUM_CLASSES, num_images=0, arch="", **fields):
    """Of a config whose data are not here; fields as group__field."""
    config = default_config()
    config.data.source = "tfds:cifar10"
    config.data.data_dir = "/nowhere"
    config.data.image_size = (16, 16)
    config.model.arch = "vit_mu4"
    config.train.update(total_steps=10, global_batch_size=128)
    config.optim.ema_decay = 0.9
    config = with_fields(config, {name.replace("__", "."): value for name, value in fields.items()})
    where = slices.Slice("local", jax.devices(), CHIP, usable)
    return planning.Plans(config, where, arch=arch, num_classes=num_classes, num_images=num_images)


def test_a_plan_has_every_figure_and_can_be_written(capsys):
    plan = planning.make_plan(plans())
    assert plan == json.loads(json.dumps(plan))
    assert plan["fits"] and plan["proposal"] == {} and plan["num_devices"] == 8
    sums = [one for one in plan["collectives"] if one["kind"] == "all-reduce"]
    assert sum(one["bytes"] for one in sums) == pytest.approx(4 * plan["num_trained"], rel=0.05)
    step = plan["step"]
    assert step["at_best_secs"] == max(
        step["compute_secs"], step["memory_secs"], step["exchange_secs"]
    )
    assert plan["hours"] == pytest.approx(10 * step["at_best_secs"] / 3600)
    assert plan["images_per_second"] == pytest.approx(128 / step["at_best_secs"])
    assert plan["pixels_per_second_and_host"] == plan["images_per_second_and_host"] * 16 * 16 * 3
    assert sum(plan["eval_memory"].values()) < sum(plan["memory"].values())

    table = format_plan(plan)
    assert "vit_mu4 at 16x16, float32: " in table
    assert "Batch of 128: 16 images on each device; 16 images in a pass, remat none" in table
    assert f"{sum(plan['memory'].values()) / 1e9:.3f}   of 1000.00 usable" in table
    assert "all-reduce" in table and "images/s" in table and "DOES NOT FIT" not in table


def test_what_fits_is_proposed_in_place_of_what_does_not(monkeypatch):
    monkeypatch.setattr(planning.Plans, "needed", lambda self, choice: choice.pass_size * 1e11)
    plan = planning.make_plan(plans(usable=1e12))
    assert not plan["fits"] and plan["bytes_asked"] == 1.6e12
    assert plan["proposal"] == {"train.micro_batch": 8}
    table = format_plan(plan)
    assert "DOES NOT FIT as asked (16 images in a pass, remat none, fsdp 1): 1600.00 GB" in table
    assert "This fits: --config.train.micro_batch=8\n" in table


def test_an_evaluation_that_does_not_fit_gets_smaller_batches(monkeypatch):
    eval_analysis = planning.Plans.eval_analysis

    def refuse_large(self, choice, batch_size):
        if batch_size > 64:
            return {"refused": None}
        return eval_analysis(self, choice, batch_size)

    monkeypatch.setattr(planning.Plans, "eval_analysis", refuse_large)
    plan = planning.make_plan(plans())
    assert not plan["fits"] and plan["proposal"] == {"eval.batch_size": 64}
    assert "DOES NOT FIT as asked: evaluation.\nThis fits: --config.eval.batch_size=64\n" in (
        format_plan(plan)
    )


def test_parameters_that_do_not_fit_are_shared_without_compiling(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**8)
    asked = plans()
    shared = footprint.state_bytes(asked.program(Choice(8, "none", 16)))
    found = plans(usable=3 * shared)
    assert not found.state_fits(1)
    compiled = []
    monkeypatch.setattr(found, "needed", lambda choice: compiled.append(choice) or 2 * shared)
    assert found.first_fitting().fsdp > 1
    assert len(compiled) == 1


def test_batch_norm_keeps_its_passes_and_says_so_when_nothing_fits(monkeypatch):
    tried = []
    monkeypatch.setattr(planning.Plans, "needed", lambda self, c: tried.append(c) or 2e12)
    with pytest.raises(UserError) as error:
        planning.make_plan(plans(model__arch="resnet_mu", data__image_size=(32, 32)))
    assert {choice.pass_size for choice in tried} == {16}
    message = str(error.value)
    assert message.startswith("Nothing fits into the 1000.00 GB of each device of local")
    assert message.endswith("or model.batch_norm='frozen', with which passes can be smaller.")
    with pytest.raises(UserError, match="BatchNorm normalises each pass by itself"):
        plans(model__arch="resnet_mu", data__image_size=(32, 32), train__micro_batch=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(num_classes=0),
            "data.source='tfds:cifar10' is not on this machine, and a plan fetches nothing.",
        ),
        (dict(num_classes=0, data__source="hf:some/data"), "'hf:some/data' is not on this"),
        (
            dict(train__total_epochs=2.0, train__total_steps=0),
            "--num_images is missing: train.total_epochs=2.0",
        ),
        (dict(arch="vit_h14", data__image_size=None, model__pretrained="a/b", model__arch=""),
         "--arch needs data.image_size"),
        (dict(mesh__data=3), "mesh.data=3 x mesh.fsdp=1 does not make 8 devices"),
        (dict(arch="vgg"), "Unknown architecture model.arch 'vgg'"),
        (dict(train__global_batch_size=100), "not divisible by 8 devices; use 96 or 104"),
        (dict(model__pretrained="/no/such", model__arch=""),
         "The folder '/no/such' does not exist. Or name its network, with --arch=vit_b16"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_said(options, message):
    with pytest.raises(UserError) as error:
        plans(**options)
    assert message in str(error.value)


def test_data_that_are_here_tell_their_classes_and_steps():
    config = dict(train__total_epochs=2.0, train__total_steps=0)
    assert plans(num_images=1000, **config).config.train.total_steps == 16  # 2000 / 128, rounded up
    table = '{"cat": 1.0, "dog": 2.0}'
    assert plans(loss__class_weights=table).config.loss.class_weights == "balanced"


def test_the_recipes_need_no_hub():
    made = plans(
        model__pretrained="google/vit-base-patch16-224-in21k", model__arch="",
        data__image_size=(32, 32),
    )  # fmt: skip
    assert made.config.model.arch == "vit_b16"


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vitcls.plan", *args],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_slice_that_is_none_ends_the_command_at_once():
    result = run("--config=configs/quickstart.py", "--topology=v9:2x2")
    assert result.returncode == 2 and "Unknown chip of --topology 'v9'" in result.stderr


TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)


def plan_slice(
    topology: str, output: Path, *fields: str, arch: str = "vit_mu16", size: int = 32
) -> dict:
    result = run(
        "--config=configs/vit_s16.py:data=tfds:imagenet2012", "--num_classes=10", f"--arch={arch}",
        f"--config.data.image_size=({size},{size})", f"--topology={topology}",
        f"--output={output}", *fields,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())


@pytest.mark.slow
@TPU
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:4x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_steps_are_compiled_for_slices_that_do_not_exist(topology, tmp_path):
    plan = plan_slice(topology, tmp_path / "plan.json")
    assert plan["chip"] == topology.partition(":")[0] and plan["fits"]
    sums = [one for one in plan["collectives"] if one["kind"] == "all-reduce"]
    assert {one["devices"] for one in sums} == {plan["num_devices"]}
    assert sum(one["elements"] for one in sums) == pytest.approx(plan["num_trained"], rel=0.05)
    assert plan["memory"]["parameters"] >= 4 * plan["num_parameters"]


@pytest.mark.slow
@TPU
def test_a_batch_that_is_too_large_for_a_slice_is_divided(tmp_path):
    plan = plan_slice(
        "v5e:2x2", tmp_path / "plan.json", "--config.train.global_batch_size=4096",
        arch="vit_s16", size=224,
    )  # fmt: skip
    assert not plan["fits"] and plan["choice"]["pass_size"] < 1024
    assert sum(plan["memory"].values()) <= plan["bytes_usable"]
