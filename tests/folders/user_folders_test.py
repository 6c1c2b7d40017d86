"""A user without a home directory is told what to set, and caches do without."""

import pwd
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vitcls import pretrained
from vitcls.data import sources
from vitcls.data.sources import builders
from vitcls.data.sources.labels import cached_labels
from vitcls.errors import UserError
from vitcls.folders import user_folders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """As a container is that runs under a number which no user has."""

    def getpwuid(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "~").exists()


def test_folders_are_those_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert user_folders.cache() == tmp_path / ".cache/vitcls"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_folders.cache() == tmp_path / "cache/vitcls"


def test_without_a_home_nothing_is_cached(homeless, monkeypatch, tmp_path):
    assert user_folders.home() is None and user_folders.cache() is None
    np.testing.assert_array_equal(cached_labels("0", lambda: [1, 2]), [1, 2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_labels("0", lambda: [1, 2])
    assert (tmp_path / "vitcls/labels/0.npy").exists()


@pytest.mark.parametrize("source", ["glyphs", "tfds:mnist"])
def test_prepared_data_need_a_folder(homeless, monkeypatch, tmp_path, source):
    message = f"The data of {source} are kept in .* set data.data_dir or --data_dir or TFDS_DATA"
    with pytest.raises(UserError, match=message) as error:
        sources.split_names(source)
    assert error.value.exit_code == 2
    assert tmp_path in Path(builders.find_builder(source, data_dir=str(tmp_path)).data_path).parents
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    builders.find_builder(source)


def test_shipped_data_need_no_folder(homeless):
    assert sources.split_names("digits") == ["train", "test"]


def test_what_comes_from_the_hub_needs_a_folder(homeless):
    with pytest.raises(UserError, match="Models of the Hugging Face hub .* set HF_HOME or HF_HUB_"):
        pretrained.find("google/vit-base-patch16-224")
    for use in (sources.split_names, lambda source: sources.open_split(source, "train")):
        with pytest.raises(UserError, match="The data of hf:a/b are kept .* set HF_HOME or HF_DAT"):
            use("hf:a/b")


def test_a_path_from_home_without_one_is_a_mistake(homeless):
    program = """
import pwd
from pathlib import Path
from vitcls import cli
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
cli.run(lambda: Path("~/x").expanduser())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert re.match("ERROR: A path begins with ~, but .* or set HOME.\n$", result.stderr)
