"""What the benchmark counts, prints, refuses and imports; not how fast anything is."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forward, make_peers, models, torch_peer, train_step
from tests.imports_test import HEAVY, LIGHT
from vitcls.errors import UserError

ROOT = Path(__file__).parents[2]
# Compiling is nearly all that a small run does.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FLAX = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not make_peers.PYTHON.exists(), reason="needs `python -m benchmarks.make_peers`"
    ),
]
QUICK = ["--image_size=32", "--windows=2", "--window_secs=0.05"]


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *args],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK_COMPILE} | env,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "image_size", "gflop"),
    [
        ("vit_s16", 224, 27.6), ("vit_b16", 224, 105.4), ("vit_l16", 224, 369),
        ("vit_s16", 384, 92.9), ("vit_b16", 384, 332.9), ("vit_l16", 384, 1146),
        ("resnet50", 224, 24.3),
    ],
)  # fmt: skip
def test_costs_are_the_published_ones(name, image_size, gflop):
    """Training GFLOP of an image: six times the multiply-adds that the literature gives."""
    config = models.published(models.arch_config(name, image_size))
    assert 6e-9 * models.macs(config) == pytest.approx(gflop, rel=0.02)


@pytest.mark.parametrize("name", ["vit_ti16", "vit_nano4", "resnet18", "resnet_mu"])
def test_costs_are_those_that_torch_counts(name):
    config = models.published(models.arch_config(name, 64))
    with torch.device("meta"):
        model = torch_peer.transformers_model(dataclasses.asdict(config))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 64, 64))
    assert 2 * models.macs(config) == counter.get_total_flops()


def test_our_vit_saves_the_last_layers_unread_tokens():
    config = models.arch_config("vit_b16", 224)
    saved = 1 - models.macs(config) / models.macs(models.published(config))
    assert saved == pytest.approx(1 / 15, rel=0.1)


@pytest.mark.parametrize(
    ("model", "peer", "dtype"),
    [
        ("vit_mu16", "none", "float32"),
        pytest.param("vit_mu16", "torch", "bfloat16", marks=pytest.mark.slow),
        pytest.param("resnet_mu", "none", "float32", marks=pytest.mark.slow),
        pytest.param("vit_mu16", "flax", "float32", marks=FLAX),
        pytest.param("resnet_mu", "flax", "bfloat16", marks=FLAX),
    ],
)
def test_a_run_measures_what_it_prints(model, peer, dtype, tmp_path):
    path = tmp_path / "result.json"
    result = run(f"--model={model}", f"--peer={peer}", f"--dtype={dtype}", f"--json={path}", *QUICK)
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    sides = ["ours"] + ["peer"] * (peer != "none")
    for side in sides:
        speed = figures[side]["images_per_second"]
        assert len(speed["windows"]) == 2
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert f"{speed['median']:.2f}" in result.stdout
        # From the definitions: images/s x GFLOP/image, and milliseconds for 8 images.
        tflops = speed["median"] * figures["gflop_per_image"] / 1e3
        assert figures[side]["tflops"] == pytest.approx(tflops)
        assert figures[side]["step_ms"] == pytest.approx(8e3 / speed["median"])
    best = max(product["median"] for product in figures["limit"]["tflops"].values())
    assert figures["ours"]["share_of_limit"] == pytest.approx(figures["ours"]["tflops"] / best)
    assert len(figures["limit"]["tflops"]) == len(sides)
    if peer == "none":
        assert figures["peer"] is None and figures["ratio"] is None
    else:
        pairs = zip(*(figures[side]["images_per_second"]["windows"] for side in sides), strict=True)
        assert figures["ratio"]["windows"] == pytest.approx([ours / peer for ours, peer in pairs])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model=vit_x16"], "Unknown architecture --model 'vit_x16'"),
        (["--model=resnet51"], "Did you mean 'resnet50'?"),
        (["--image_size=100"], "not divisible by the patch size"),
        (["--batch_size=0"], "0 is not positive"),
        (["--window_secs=some"], "invalid float value: 'some'"),
        (["--peer=keras"], "invalid choice: 'keras'"),
        (["--json=no/such/folder.json"], "there is no folder no/such"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_exit_2_with_one_message(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step", *args])
    with pytest.raises(SystemExit, match="2"):
        train_step.main()
    assert message in capsys.readouterr().err


def test_a_missing_peer_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none', name='torch')")
    result = run("--model=vit_mu16", "--peer=torch", *QUICK, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2, result.stderr
    assert "The peer needs torch, which is not installed" in result.stderr
    assert "-m pip install torch" in result.stderr


def test_the_flax_peer_asks_for_its_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(make_peers, "PYTHON", tmp_path / "python")
    with pytest.raises(UserError, match="python -m benchmarks.make_peers"):
        train_step.start_peer("flax", "cpu")
    with pytest.raises(UserError, match="on a CPU only: set JAX_PLATFORMS=cpu"):
        train_step.start_peer("flax", "gpu")


def test_a_difference_beyond_rounding_ends_the_run():
    expected = {"loss": jnp.float32(7.0), "grad_norm": jnp.float32(20.0)}
    close = {"loss": jnp.float32(7.01), "grad_norm": jnp.float32(20.2)}
    numerics = train_step.check_numerics(close, expected, "bfloat16")
    assert numerics["loss"]["difference"] == pytest.approx(0.01 / 7, rel=1e-3)
    with pytest.raises(ArithmeticError, match="loss is 7.01.* in float32, but 7.0 in float32 at"):
        train_step.check_numerics(close, expected, "float32")
    with pytest.raises(ArithmeticError, match="grad_norm is nan"):
        train_step.check_numerics(close | {"grad_norm": jnp.nan}, expected, "bfloat16")


def test_logits_beyond_rounding_end_the_run():
    expected = jnp.arange(6.0).reshape(2, 3)
    assert forward.check_logits(expected * 1.01, expected, "bfloat16")["difference"] > 0.009
    for wrong in (expected * 1.01, expected.at[0, 0].set(jnp.nan)):
        with pytest.raises(ArithmeticError, match="away from those in float32"):
            forward.check_logits(wrong, expected, "float32")


@pytest.mark.slow
def test_evaluation_is_measured_beside_torch(monkeypatch, tmp_path, capsys):
    path = tmp_path / "a.json"
    args = ["--model=vit_mu16", "--peer=torch", f"--json={path}", *QUICK]
    monkeypatch.setattr(sys, "argv", ["forward", *args])
    forward.main()
    figures = json.loads(path.read_text())
    config = models.published(models.arch_config("vit_mu16", 32))
    assert figures["gflop_per_image"] == pytest.approx(2e-9 * models.macs(config))
    assert f"{figures['peer']['images_per_second']['median']:.2f}" in capsys.readouterr().out


def test_imports_are_light():
    program = "import json, sys, benchmarks.train_step; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    modules = json.loads(result.stdout)
    assert not HEAVY & set(modules)
    own = {name.split(".")[1] for name in modules if name.startswith("vitcls.")}
    # The last two are of the standard library alone.
    assert {"models", "step"} <= own <= LIGHT | {"errors", "files", "folders"}


@pytest.mark.slow
def test_ways_to_train_a_part_are_measured_beside_their_bounds(tmp_path):
    path = tmp_path / "figures.json"
    result = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.partial_training", "--model=vit_mu16", *QUICK,
            f"--json={path}",
        ],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK_COMPILE}, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ways = json.loads(path.read_text())["ways"]
    assert ways["full"]["bound"] == 1
    assert ways["head"]["num_trained"] == 33_000  # 32 x 1 000 and the biases
    assert ways["half"]["num_trained"] < ways["full"]["num_trained"]
    for way in ("half", "head", "lora", "patch_dropout"):
        assert ways[way]["bound"] > 1
        assert ways[way]["peak_mb"] < ways["full"]["peak_mb"]
        assert f"| {way} |" in result.stdout
