"""The list of skipped images: complete, without repetition, and never most of a split."""

import concurrent.futures
import errno
import fcntl
import json
import multiprocessing
import os

import numpy as np
import pytest

from vitcls.data import sources
from vitcls.data.skipped import Skipped
from vitcls.errors import UserError
from vitcls.folders import lock


class Named(sources.Split):
    """Examples without content."""

    class_names, fingerprint = ("a", "b"), "named"

    def __init__(self, name, num_examples):
        self.name, self._num_examples = name, num_examples

    def __len__(self):
        return self._num_examples

    def read(self, index):
        return b"", 0

    def id(self, index):
        return f"{self.name}/{index}.jpg"

    def labels(self):
        return np.zeros(len(self), np.int32)


class OfTwo(Named):
    """The first two examples are of a class of their own."""

    def labels(self):
        return (np.arange(len(self)) >= 2).astype(np.int32)


TRAIN, TEST = Named("train", 1000), Named("test", 10)


def bad(*indices, split=TRAIN):
    return tuple((split.id(index), "The file is empty.") for index in indices)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "skipped.jsonl"


def test_every_image_is_listed_once_with_its_reason(path, caplog):
    skipped = Skipped(path)
    skipped.add(TRAIN, ())
    assert not path.exists()
    for _ in range(2):
        skipped.add(TRAIN, bad(1, 2, 1))
        skipped.add(TEST, bad(1, split=TEST))
    assert lines(path) == [
        {"split": "train", "id": "train/1.jpg", "reason": "The file is empty."},
        {"split": "train", "id": "train/2.jpg", "reason": "The file is empty."},
        {"split": "test", "id": "test/1.jpg", "reason": "The file is empty."},
    ]
    assert (skipped.count("train"), skipped.count("test"), skipped.count("val")) == (2, 1, 0)
    assert caplog.text.count("Skipping train/1.jpg of split 'train': The file is empty.") == 1


def test_a_continued_run_goes_on_with_the_list(path):
    Skipped(path).add(TRAIN, bad(1, 2))
    with path.open("a") as file:
        file.write('{"split": "train", "id": "tra')  # a disk that was full
    skipped = Skipped(path)
    assert skipped.count("train") == 2
    skipped.add(TRAIN, bad(2, 3))
    assert [line["id"] for line in lines(path)] == [f"train/{i}.jpg" for i in (1, 2, 3)]


def add_all(path) -> int:
    skipped = Skipped(path)
    for index in range(100):
        skipped.add(TRAIN, bad(index, index + 1))
    return skipped.count("train")


def test_threads_and_processes_share_one_list(path):
    processes = concurrent.futures.ProcessPoolExecutor(
        3, mp_context=multiprocessing.get_context("forkserver")
    )
    with processes, concurrent.futures.ThreadPoolExecutor(3) as threads:
        counts = [pool.submit(add_all, path) for pool in (threads, processes) for _ in range(3)]
        assert {count.result() for count in counts} == {101}
    assert sorted(line["id"] for line in lines(path)) == sorted(
        f"train/{i}.jpg" for i in range(101)
    )


def test_the_log_names_the_first_and_counts_all(path, caplog):
    caplog.set_level("INFO", "vitcls")
    skipped = Skipped(path)
    skipped.add(TRAIN, bad(*range(30)))
    assert caplog.text.count("Skipping train/") == 10
    assert "skipped from here on are listed in" in caplog.text
    skipped.log_counts([TRAIN, TEST])
    assert f"train: 30 of 1000 images skipped, see {path}." in caplog.text
    assert "test: 0 of 10 images skipped." in caplog.text


def test_more_than_half_of_a_split_is_too_much(path):
    skipped = Skipped(path)
    skipped.add(TEST, bad(0, 1, 2, 3, 4, split=TEST))
    message = (
        "half of the 10 images in 'test' cannot be used, such as test/9.jpg: The file is empty"
    )
    with pytest.raises(UserError, match=message):
        skipped.add(TEST, bad(9, split=TEST))
    assert len(lines(path)) == 6  # for whoever mends them


def test_a_bad_stretch_is_not_taken_for_a_bad_split(path):
    """Splits are evaluated in the order of their classes, one of which may be bad."""
    big = Named("test", 10_000)
    skipped = Skipped(path)
    skipped.add(big, bad(*range(2000), split=big))
    skipped.add(TRAIN, (), num_sampled=2000)
    assert skipped.count("test") == 2000


def test_a_file_system_without_locks_has_a_list_too(path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "_WARNED", set())
    first, second = Skipped(path), Skipped(path)
    first.add(TRAIN, bad(1, 2))
    second.add(TRAIN, bad(2, 3))
    with path.open("a") as file:
        file.write('{"split": "tr\0\0\n{"split')  # what two processes wrote at once
    first.add(TRAIN, bad(3, 4))
    assert [entry["id"] for entry in lines_that_can_be_read(path)] == [
        f"train/{index}.jpg" for index in (1, 2, 3, 4)
    ]
    assert Skipped(path).count("train") == 4
    assert caplog.text.count("is on a file system without locks") == 1


def lines_that_can_be_read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def test_a_class_that_is_skipped_as_a_whole_is_an_error(path):
    split, skipped = OfTwo("train", 9), Skipped(path)
    skipped.add(split, bad(0, 5, split=split))
    skipped.check_classes(split)
    Skipped(path).add(split, bad(1, split=split))  # another process
    message = "train: 1 of 2 classes have no images to train on: a"
    with pytest.raises(UserError, match=message):
        skipped.check_classes(split)
