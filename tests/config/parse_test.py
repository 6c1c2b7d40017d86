"""What is written as text is read, or a message says what is wrong."""

import pytest

from vitcls.config.parse import (
    absolute_checkpoint,
    absolute_source,
    parse_arg,
    read_class_weights,
)
from vitcls.errors import UserError


def test_a_table_of_class_weights_may_be_a_file(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text('{"cat": 1,\n "dog": 2.5}')
    assert read_class_weights(str(path)) == '{"cat": 1, "dog": 2.5}'
    assert read_class_weights('{"cat": 1, "dog": 2.5}') == '{"cat": 1, "dog": 2.5}'


@pytest.mark.parametrize("how", ["balanced " * 100, "/"])
def test_what_cannot_be_read_as_a_file_is_no_table_either(how):
    with pytest.raises(UserError, match="must be none, balanced, effective"):
        read_class_weights(how)


def test_a_table_may_be_longer_than_a_path():
    assert read_class_weights(f' {{"{"cat" * 100}": 1}}')


def test_parse_arg_reads_pairs_and_keeps_defaults():
    assert parse_arg("data=tfds:cifar100", data="", size="16") == {
        "data": "tfds:cifar100",
        "size": "16",
    }
    with pytest.raises(UserError, match="Did you mean 'data'?"):
        parse_arg("dta=x", data="")
    with pytest.raises(UserError, match="not of the form name=value"):
        parse_arg("data", data="")


def test_relative_sources_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert absolute_source("folder:photos") == f"folder:{tmp_path}/photos"
    assert absolute_source("folder:../x") == f"folder:{tmp_path.parent}/x"
    assert absolute_source("csv:a.csv?image=file") == f"csv:{tmp_path}/a.csv?image=file"
    assert absolute_source("hf:saved?label=y") == f"hf:{tmp_path}/saved?label=y"
    for name in (
        "digits", "tfds:cifar10", "hf:uoft-cs/cifar10", "folder:~/photos", "folder:", "csv:/a.csv",
    ):  # fmt: skip
        assert absolute_source(name) == name


def test_relative_folders_of_checkpoints_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    for name in ("runs/mine", "runs/mine@best", "runs/mine@20"):
        assert absolute_checkpoint(name) == f"{tmp_path}/{name}"
    for name in ("", "google/vit-base-patch16-224", "google/vit@main", f"{tmp_path}/runs/mine"):
        assert absolute_checkpoint(name) == name
