"""Imports go down only, and a training process stays free of TensorFlow."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rooms, and files beside them, from bottom to top: a file may import from its own room and from
# floors below.
FLOORS = [
    {"errors"},
    {"augment", "files"},
    {"config", "models"},
    {"step"},
    {"processes", "recipes"},
    {"logs"},
    {"folders"},
    {"cli", "checkpoints", "costs", "data"},
    {"pretrained"},
    {"decision", "inference"},
    {"run"},
    {"provenance"},
    {"evaluate", "export", "predict"},
    {"check_data", "plan", "probe", "soup", "train"},
    {"analysis", "main"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Modules of vitcls/analysis that are commands.
ANALYSES = {"report", "compare", "decide", "explain", "select", "reproduce", "results"}
# What a machine without the data stack can import.
LIGHT = {"augment", "models", "step"}
LIGHT_PACKAGES = {"jax", "flax", "optax", "numpy", "vitcls"} | sys.stdlib_module_names
HEAVY = {
    "tensorflow", "torch", "transformers", "sklearn", "scipy.stats", "tensorboard", "clu",
    "datasets", "matplotlib", "jinja2", "wandb",
}  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "vitcls").with_suffix("").parts[0]


def is_command(path: Path) -> bool:
    is_analysis = path.parent.name == "analysis" and path.stem in ANALYSES
    return path.stem == "__main__" or is_analysis or room_of(path) == "main"


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


def test_every_room_has_a_floor():
    assert {room_of(path) for path in SOURCES} - {"__init__"} == FLOOR_OF.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "vitcls" and parts[1] in FLOOR_OF and own not in ("__init__", parts[1]):
            assert FLOOR_OF[parts[1]] < FLOOR_OF[own], f"{own} imports {name}"


def test_no_file_imports_itself_by_way_of_others():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    known = {}
    for name, path in names.items():
        found = imports(path) | {one.rpartition(".")[0] for one in imports(path)}
        known[name] = found & names.keys() - {name}
    while leaves := {name for name, needed in known.items() if not needed & known.keys()}:
        known = {name: needed for name, needed in known.items() if name not in leaves}
    assert not known


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if room_of(path) in LIGHT],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_light_rooms_need_jax_flax_optax_numpy_only(path):
    assert {name.split(".")[0] for name in imports(path)} <= LIGHT_PACKAGES


def test_launch_is_above_all_and_needs_little():
    assert not [path for path in SOURCES if any(x.startswith("launch") for x in imports(path))]
    packages = {"absl", "launch", "ml_collections", "tqdm", "vitcls", "yaml"}
    for path in (ROOT / "launch").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= packages | sys.stdlib_module_names


def test_only_commands_touch_flags():
    with_flags = {
        path
        for path in SOURCES
        if any(name.startswith("absl.flags") or name == "absl.flags" for name in imports(path))
        and not is_command(path)
    }
    # Grain's worker processes inherit parsed flags: the loader marks them parsed as a library.
    assert {room_of(path) for path in with_flags} <= {"cli", "data"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_a_command(path):
    assert not [name for name in imports(path) if ".__main__" in name or name == "vitcls.main"]


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
