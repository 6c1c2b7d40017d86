"""The bars of the layout: how large a room, a file and a function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "vitcls"
SOURCES = sorted(ROOT.rglob("*.py"))
MAX_ROOT_FILES, MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ROOM_LINES = 8, 400, 100, 1250
MAX_LIGHT_LINES, MAX_CORE_LINES = 3100, 5000
LARGE_ROOMS = {"data", "pretrained", "analysis"}
LONG_FUNCTIONS = {"train.py:train_and_evaluate": 130}


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def lines_of_rooms() -> dict[str, int]:
    rooms = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        if len(parts) > 1:
            rooms[parts[0]] = rooms.get(parts[0], 0) + num_lines(path)
    return rooms


def test_the_root_has_few_files():
    assert len(list(ROOT.glob("*.py"))) <= MAX_ROOT_FILES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    name = str(path.relative_to(ROOT))
    assert num_lines(path) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            most = LONG_FUNCTIONS.get(f"{name}:{node.name}", MAX_FUNCTION_LINES)
            assert size <= most, node.name


def test_rooms_are_small():
    rooms = lines_of_rooms()
    light = sum(rooms[room] for room in ("models", "augment", "step"))
    assert light <= MAX_LIGHT_LINES
    # The core is what a reader of one afternoon reads.
    assert light + rooms["run"] + rooms["config"] + num_lines(ROOT / "train.py") <= MAX_CORE_LINES
    for room in rooms.keys() - LARGE_ROOMS:
        assert rooms[room] <= MAX_ROOM_LINES, room


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.name == "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_rooms_open_with_a_docstring_and_import_nothing(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    # Its module and its function `find` have one name, which a lazy import would confuse.
    if path.parent.name != "pretrained":
        assert not [node for node in imported if node.module.startswith("vitcls")]
