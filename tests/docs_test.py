"""What the pages in docs/ name exists."""

import re
from pathlib import Path

import pytest

from tests import recognised

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def test_what_is_recognised_is_what_the_code_says():
    text = recognised.PAGE.read_text()
    assert recognised.page(text) == text, "run python -m tests.recognised"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_code_exist(page):
    """Paths such as `vitcls/train.py`, whether in prose or in a command."""
    for path in re.findall(
        r"(?<![\w/])(?:vitcls|tests|benchmarks|launch|configs)/[\w/-]+\.(?:py|sh)", page.read_text()
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page):
    for target, anchor in re.findall(r"\]\(([\w/]*(?:\.md)?)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in titles}


def test_the_readme_names_every_room_and_stays_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    for path in (ROOT / "vitcls").iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            assert f"`{path.name}`" in text, path.name
        elif (path / "__init__.py").exists():
            assert f"`{path.name}/`" in text, path.name


def test_names_in_the_page_on_extending_are_in_the_files_that_it_names():
    text = (ROOT / "docs/extending.md").read_text()
    paths = set(re.findall(r"`((?:vitcls|tests|benchmarks)/[\w/]+\.py)`", text))
    assert len(paths) > 10
    sources = {path: (ROOT / path).read_text() for path in paths}
    for name in ("FIELDS", "may_change", "needs", '"loss.name"'):
        assert name in sources["vitcls/config/fields.py"]
    for path, names in {
        "vitcls/step/losses.py": ("make_loss", "cross_entropy"),
        "vitcls/augment/prepare.py": ("make_prepare", "keys_of"),
        "vitcls/data/sources/split.py": ("class Split", "fingerprint"),
        "vitcls/data/sources/files.py": ("class FilesSplit",),
        "vitcls/data/sources/open.py": ("def open_split", "def split_names"),
        "vitcls/step/optim.py": ("OPTIMIZERS", "def make_schedule"),
        "vitcls/step/adapt.py": ("TRAINED", "def add_lora", "def with_lora", "def fold_lora"),
        "vitcls/pretrained/families/family.py": (
            "class Family",
            "read_config",
            "write_config",
            "key_table",
        ),
        "vitcls/pretrained/keys.py": ("def dense", "def norm", "def patches"),
        "vitcls/pretrained/reading.py": ("FAMILIES", "def make_model"),
        "vitcls/models/vit_config.py": ("class ViTConfig", "pre_norm"),
    }.items():
        for name in names:
            assert name in sources[path], (path, name)
            assert name.split()[-1] in text, name
