"""Files are whole or absent, on the disk before they have their name, and read with a message."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitcls import files
from vitcls.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed, by name, in order."""
    seen, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        seen.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(source, target):
        seen.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(Path, "replace", lambda path, target: noted_replace(path, target))
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are those of /proc")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    files.write_json(tmp_path / "a.json", {"b": 1})
    assert calls == [("sync", "a.json.tmp"), ("rename", "a.json"), ("sync", tmp_path.name)]
    assert files.read_json(tmp_path / "a.json", remedy="") == {"b": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are those of /proc")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with files.folder_aside(tmp_path / "out") as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "file").write_text("x")
    names = [name for what, name in calls if what == "sync"]
    renamed = calls.index(("rename", "out"))
    assert {"sub", "file"} <= {name for _, name in calls[:renamed]}
    assert names[-1] == tmp_path.name and calls[-1][0] == "sync"
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError), files.written_aside(tmp_path / "a.json") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]", "\0" * 40, "null"])
def test_a_cut_file_has_one_message_or_is_set_aside(text, tmp_path, monkeypatch, caplog):
    path = tmp_path / "results.json"
    path.write_text(text)
    message = f"{path}, a list, cannot be read"
    with pytest.raises(UserError, match=f"^{re.escape(message)} .*: put it back.$"):
        files.read_json(path, what="a list", remedy="put it back")
    monkeypatch.setattr(files.log, "propagate", True)
    assert files.read_or_set_aside(path) is None
    assert "results.json cannot be read" in caplog.text and "results.json.unread" in caplog.text
    assert os.listdir(tmp_path) == ["results.json.unreadable"]
    assert files.read_or_set_aside(path) is None


def test_a_missing_file_has_a_message_too(tmp_path):
    with pytest.raises(UserError, match="a.json cannot be read .*No such file.*: put it back."):
        files.read_json(tmp_path / "a.json", remedy="put it back")


def test_files_needs_no_jax():
    program = (
        "import sys; import vitcls.files, vitcls.folders.ownership; print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
