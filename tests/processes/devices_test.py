"""Devices start late, in commands that compute; what keeps them from it has message and code."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vitcls.errors import Unavailable, UserError
from vitcls.processes import devices
from vitcls.step import optim

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/quickstart.py:init=scratch"
SWEEP = "--sweep=configs/sweeps/lr_wd.py"
COMMANDS = ["main", "evaluate", "predict", "export", "probe", "plan", "soup", "check_data"]
COMMANDS += [
    f"analysis.{name}"
    for name in ("report", "compare", "explain", "select", "reproduce", "results")
]


def run(module: str, *args: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env=os.environ | variables, check=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _not_started():
    devices._start.cache_clear()
    yield
    devices._start.cache_clear()


# Nothing below starts a device: there is none of this kind.
NOWHERE = {"JAX_PLATFORMS": "nonexistent"}


@pytest.mark.parametrize(
    "module", [*(f"vitcls.{name}" for name in COMMANDS), "launch.submit", "launch.sweep"]
)
def test_help_starts_no_device(module):
    assert run(module, "--help", **NOWHERE).returncode == 0


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("launch.submit", ["--on=local", "--dry_run"]),
        ("launch.submit", ["--on=slurm", "--dry_run"]),
        ("launch.submit", ["--on=tpu-vm", "--dry_run", "--tpu=t"]),
        ("launch.submit", ["--on=kubernetes", "--dry_run", "--image=i", "--volume=v:/runs"]),
        ("launch.sweep", ["--dry_run", SWEEP]),
        ("launch.sweep", ["--dry_run", SWEEP, "--on=slurm"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_launchers_start_no_device(module, flags):
    result = run(module, CONFIG, "--workdir=/runs/x", *flags, **NOWHERE)
    assert result.returncode == 0, result.stderr


def test_a_sweep_that_runs_starts_no_device_but_its_trials(tmp_path):
    """Each trial finds none, and is started again."""
    (tmp_path / "one.py").write_text("def get_sweep():\n    return [{'optim.lr': 1e-3}]\n")
    # The first import of a process is noted, with whether it has started devices at its end.
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "def note():\n"
        "    bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "    if 'launch.trials' in sys.modules:\n"
        "        print('STARTED', bool(bridge and bridge.backends_are_initialized()))\n"
        "atexit.register(note)\n"
    )
    flags = [CONFIG, f"--sweep={tmp_path}/one.py", f"--workdir={tmp_path}/s"]
    flags += ["--config.data.source=folder:/nowhere"]  # each trial ends at once
    result = run("launch.sweep", *flags, PYTHONPATH=str(tmp_path), JAX_PLATFORMS="cpu")
    assert "STARTED False" in result.stdout, result.stdout + result.stderr


def test_checking_optimizers_starts_no_device():
    program = """
from jax._src import xla_bridge
from vitcls.step import optim
from vitcls.errors import UserError

ARGS = {"sgd": {"momentum": 0.9}, "adamw": {"b1": 0.8, "nesterov": True}, "rmsprop": {"decay": 0.9},
        "lion": {"mu_dtype": "float32"}, "noisy_sgd": {"key": 3}, "adafactor": {"decay_rate": 0.7}}
for name in optim.OPTIMIZERS:
    optim.check_args(name, ARGS.get(name, {}))
    assert not xla_bridge.backends_are_initialized(), name
for name, args in [("sgd", {"momentum": "x"}), ("adam", {"b3": 1}), ("sgd", {"learning_rate": 1}),
                   ("adamm", {}), ("lbfgs", {}), ("adamw", {"mu_dtype": "float99"})]:
    try:
        optim.check_args(name, args)
        raise SystemExit(f"{name} {args} is accepted")
    except UserError as error:
        print(error)
    assert not xla_bridge.backends_are_initialized(), name
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | NOWHERE, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "backend" not in result.stdout
    assert len(optim.OPTIMIZERS) > 30


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, digits_dir) -> Path:
    """A run of one step."""
    path = tmp_path_factory.mktemp("run") / "run"
    done = run("vitcls.main", CONFIG, f"--workdir={path}", *fields(digits_dir))
    assert done.returncode == 0, done.stderr
    return path


def fields(digits_dir: str) -> list[str]:
    return [
        f"--config.data.data_dir={digits_dir}", "--config.train.total_epochs=0",
        "--config.train.total_steps=1", "--config.optim.warmup_steps=0",
        "--config.model.arch=vit_mu4", "--config.data.image_size=(8, 8)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "platforms"),
    [
        ("main", "nonexistent"),
        ("evaluate", "nonexistent"),
        *(
            pytest.param(name, "nonexistent", marks=pytest.mark.slow)
            for name in [*COMMANDS[2:8], "analysis.explain", "analysis.select"]
        ),
        pytest.param("main", "cuda", marks=pytest.mark.slow),
    ],
)
def test_every_command_says_that_devices_do_not_start(
    command, platforms, workdir, digits_dir, tmp_path
):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = ["--data=digits", f"--data_dir={digits_dir}"]
    checkpoint, output = f"--checkpoint={workdir}", f"--output={tmp_path}/out"
    images = f"--images={tmp_path}/a.png"
    args = {
        "main": [CONFIG, f"--workdir={tmp_path}/new", *fields(digits_dir)],
        "evaluate": [checkpoint, *data],
        "predict": [checkpoint, images],
        "export": [checkpoint, "--format=huggingface", output],
        "probe": [checkpoint, *data, output],
        "plan": [CONFIG, *fields(digits_dir)],
        "soup": [f"--checkpoints={workdir}", "--how=uniform", output],
        "check_data": [CONFIG, output, *fields(digits_dir)],
        "analysis.explain": [checkpoint, images, output],
        # Images that the candidate was trained on cannot rank it.
        "analysis.select": [f"--candidates={workdir}", *data, "--train_split=test", output],
    }[command]
    result = run(f"vitcls.{command}", *args, JAX_PLATFORMS=platforms)
    assert result.returncode == 69, result.stderr
    message = f"ERROR: jax cannot start its devices with JAX_PLATFORMS={platforms}: "
    assert message in result.stderr and "Traceback" not in result.stderr
    assert "Try again, or on another machine; JAX_PLATFORMS=cpu" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Unable to initialize backend 'cuda': no supported devices found"),
        RuntimeError("Unable to initialize backend 'tpu': The TPU is already in use by process 7"),
        jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    ],
)
def test_a_backend_whose_devices_are_taken_says_so(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(Unavailable, match="jax cannot start its devices.*") as caught:
        devices.start_devices()
    assert str(error) in str(caught.value) and caught.value.exit_code == 69


def test_a_device_whose_memory_is_taken_says_so(monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.")

    monkeypatch.setattr(jax, "device_put", fail)
    with pytest.raises(Unavailable, match="RESOURCE_EXHAUSTED.*Another process may have them"):
        devices.start_devices()


def test_a_processor_does_not_stand_in_for_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(type(jax.config), "jax_platforms", "cuda,cpu")
    with pytest.raises(Unavailable, match="no device of 'cuda' is here, only a processor"):
        devices.start_devices()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JAX_ENABLE_X64", "1", "JAX_ENABLE_X64=True computes in float64"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict", "JAX_NUMPY_DTYPE_PROMOTION=strict refuses sums"),
        ("JAX_DISABLE_JIT", "1", "JAX_DISABLE_JIT=True compiles nothing"),
    ],
)
@pytest.mark.parametrize("command", ["main", "evaluate"])
def test_settings_of_jax_that_change_the_computation_are_refused(
    command, variable, value, message, tmp_path
):
    args = [CONFIG, f"--workdir={tmp_path}/new"] if command == "main" else []
    args = args or ["--checkpoint=x", "--data=digits"]
    result = run(f"vitcls.{command}", *args, **{variable: value})
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and f"unset it, or set {variable}=" in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_library_call_refuses_them_too(tmp_path):
    from vitcls import train
    from vitcls.config import default_config

    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64=True computes in"):
        train.train_and_evaluate(default_config(), tmp_path)


def test_devices_start_where_nothing_is_wrong():
    devices.start_devices()
    assert devices.settings()["jax_threefry_partitionable"] == "True"
    assert np.asarray(jax.device_put(1.0)) == 1
