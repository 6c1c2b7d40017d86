"""Settings and data shared by all tests: 8 simulated CPU devices, strict ranks, no user folders."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile
from importlib.metadata import version

import pytest
from absl import flags

# What a cluster, or the user's shell, tells jax and wandb is not meant for tests.
_FOREIGN = ("JAX_", "KUBERNETES_", "OMPI_", "SLURM_", "TPU_", "WANDB_")
for _name in list(os.environ):
    # pytest's worker processes inherit the one that is kept, see below.
    if _name.startswith(_FOREIGN) and _name != "JAX_COMPILATION_CACHE_DIR":
        del os.environ[_name]

# Read when a test module imports jax; commands that tests start inherit all of it.
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what small tests do: machine code that is not optimised saves a third of it.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# The older of two code generators takes a third of the time. jaxlib 0.11 has only the newer one,
# and ends at a flag that it does not know.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# The same step is compiled by many tests, and by the commands that they start.
# pytest's worker processes inherit the folder of the process that starts them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vitcls-jax-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Read when a test module imports datasets, before any fixture could set it.
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "datasets")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

flags.FLAGS.mark_as_parsed()

# `nohup`, background jobs and some CI runners ignore signals, which commands would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_DFL)
# A handler is not inherited, so that commands get the default; the tests still outlive a terminal.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.fixture(scope="session", autouse=True)
def _user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps tests out of the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tfds data folder with a copy of the `digits` that vitcls ships."""
    data_dir = tmp_path_factory.mktemp("tfds")
    shipped = pathlib.Path(__file__).parents[1] / "vitcls" / "data" / "digits" / "1.0.0"
    shutil.copytree(shipped, data_dir / "digits" / "1.0.0")
    return str(data_dir)
