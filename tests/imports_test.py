"""Imports go down only, and a training process stays free of TensorFlow."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From bottom to top; a module may import from its own level and from those below.
LEVELS = [
    {"errors"},
    {"files", "ownership", "signals", "lock", "seal", "step_folders", "wandb_sender"}
    | {"user_folders", "image_metadata", "progress"},
    {"augment", "pixels", "policies", "mixing", "losses", "metrics", "sharding", "devices"},
    {"train_step", "models", "images", "adapt", "optim", "heads"},
    {"data", "pretrained", "checkpoint", "metric_writers", "parameters"}
    | {"distributed", "watchdog", "contact_sheet", "chips", "hlo", "collectives"}
    | {"traffic", "footprint"},
    {"inference", "evaluation", "prediction", "config", "recipes", "records", "soups", "features"},
    {"teacher", "program", "train_setup", "seen", "train"},
    {"model_card", "exporting", "data_checks", "ingredients", "souping", "probing", "choices"}
    | {"planning", "plan_table"},
    {"cli", "main", "evaluate", "predict", "export", "soup", "check_data", "probe", "plan"}
    | {"analysis"},
]
# Modules of vitcls/analysis that are commands.
ANALYSES = {"report", "compare", "explain", "select", "reproduce", "results"}
# What a machine without the data stack can import.
LIGHT = {"train_step", "models", "optim", "adapt", "heads"} | LEVELS[2]
LIGHT_PACKAGES = {"jax", "flax", "optax", "numpy", "vitcls"} | sys.stdlib_module_names
HEAVY = {
    "tensorflow", "torch", "transformers", "sklearn", "scipy.stats", "tensorboard", "clu",
    "datasets", "matplotlib", "jinja2", "wandb",
}  # fmt: skip


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "vitcls").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted((ROOT / "vitcls").rglob("*.py"))


def test_every_module_has_a_level():
    assert {module_of(path) for path in SOURCES} - {"__init__"} == set().union(*LEVELS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    level_of = {name: level for level, names in enumerate(LEVELS) for name in names}
    own = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "vitcls" and parts[1] in level_of and own != "__init__":
            assert level_of[parts[1]] <= level_of[own], f"{own} imports {name}"


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if module_of(path) in LIGHT],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_core_needs_jax_flax_optax_numpy_only(path):
    assert {name.split(".")[0] for name in imports(path)} <= LIGHT_PACKAGES


def test_launch_is_above_all_and_needs_little():
    assert not [path for path in SOURCES if any(x.startswith("launch") for x in imports(path))]
    packages = {"absl", "launch", "ml_collections", "tqdm", "vitcls", "yaml"}
    for path in (ROOT / "launch").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= packages | sys.stdlib_module_names


def test_only_commands_touch_flags():
    with_flags = {
        path.stem if path.parent.name == "analysis" else module_of(path)
        for path in SOURCES
        if any(name.startswith("absl.flags") or name == "absl.flags" for name in imports(path))
    } - ANALYSES
    # Grain's worker processes inherit parsed flags: the loader marks them parsed as a library.
    assert with_flags <= LEVELS[-1] | {"data"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_commands_know_of_commands(path):
    commands = LEVELS[-1] - {"analysis"} | {f"analysis.{name}" for name in ANALYSES}
    is_command = module_of(path) in LEVELS[-1] - {"analysis"} or path.stem in ANALYSES
    known = {
        command
        for name in imports(path)
        for command in commands
        if (name + ".").startswith(f"vitcls.{command}.")
    }
    assert is_command or not known


def test_training_on_prepared_data_imports_nothing_heavy(digits_dir, tmp_path):
    program = f"""
import json, sys
from vitcls import train
from vitcls.config import default_config
config = default_config()
config.data.update(source="digits", data_dir={digits_dir!r}, image_size=(8, 8))
config.model.arch = "vit_mu4"
config.train.update(total_steps=1, global_batch_size=8)
config.eval.batch_size = 512
train.train_and_evaluate(config, {str(tmp_path / "run")!r})
print(json.dumps(sorted(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    modules = json.loads(result.stdout.splitlines()[-1])
    assert "vitcls.train" in modules and "grain" in modules
    assert not {name for name in modules if name in HEAVY}
