"""Classes by name: order, positions, and what does not match."""

import re

import numpy as np
import pytest

from vitcls.data.sources import classes
from vitcls.data.sources.split import Split
from vitcls.errors import UserError

CLASSES = ("cat", "ant", "bee")
NAMES = ("bee", "dog", "cat", "eel", "ant", "fox", "gnu")
WORDS = ("null", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Examples(Split):
    """Labels only."""

    def __init__(self, name: str, class_names: tuple[str, ...], labels: list[int]):
        self.name, self.class_names, self.fingerprint = name, class_names, name
        self._labels = labels

    def __len__(self):
        return len(self._labels)

    def read(self, index):
        return b"", self._labels[index]

    def id(self, index):
        return str(index)

    def labels(self):
        return np.array(self._labels, np.int32)


def test_two_unicode_forms_of_a_name_are_shown_as_what_they_are():
    composed, decomposed = ("caf\xe9", "tea"), ("cafe\u0301", "tea")
    expected = re.escape(
        r"in both, but in two Unicode forms: 'cafe\u0301' (NFD) and 'caf\xe9' (NFC). Rename the "
        "first to the second, for example with unicodedata.normalize('NFC', name) in Python."
    )
    with pytest.raises(UserError, match=expected):
        classes.match(decomposed, composed, by="name")
    train, test = Examples("train", composed, [0, 1]), Examples("test", decomposed, [0, 1])
    with pytest.raises(UserError, match=expected):
        classes.align(train, test)
    expected = re.escape(r"'caf\xe9' (NFC) and 'cafe\u0301' (NFD). Rename the first to the second")
    with pytest.raises(UserError, match=expected):
        classes.match((*composed, "x"), decomposed, by="index")
    assert not classes.other_forms(composed, ("cafe", "tea"))


def test_whole_numbers_are_ordered_by_value_and_all_else_as_text():
    assert classes.ordered(["10", "2", "0", "1"]) == ["0", "1", "2", "10"]
    assert classes.ordered(["010", "002"]) == ["002", "010"]
    assert classes.ordered(["10", "2", "b"]) == ["10", "2", "b"]
    assert [classes.whole_number(name) for name in ("7", "07", "7.0", "7.5", "-1", "x", "")] == [
        7, 7, 7, None, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("class_names", "model_names", "by", "expected"),
    [
        (CLASSES, NAMES, "name", [2, 4, 0]),
        (CLASSES, CLASSES, "name", [0, 1, 2]),
        (CLASSES, ("n01", "n02", "n03"), "index", [0, 1, 2]),
        # Whole numbers are positions, in whatever order they stand and however many there are.
        (("0", "1", "2", "10"), WORDS, "index", [0, 1, 2, 10]),
        (("0", "1", "10", "2"), WORDS, "index", [0, 1, 10, 2]),
        (("00", "01", "02"), ("0", "1", "2"), "index", [0, 1, 2]),
        # Counted from 1, they are as many as the checkpoint's.
        (("1", "2", "3"), ("a", "b", "c"), "index", [0, 1, 2]),
    ],
)
def test_classes_are_matched(class_names, model_names, by, expected):
    assert classes.match(class_names, model_names, by=by).tolist() == expected


def test_equal_lists_match_although_names_repeat():
    cranes = ("crane", "eel", "crane")  # as in ImageNet: the bird and the machine
    assert classes.match(cranes, cranes, by="name").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("class_names", "model_names", "by", "message"),
    [
        (("n01", "bee"), ("ant", "bee"), "name",
         "--labels=name: 1 of the data's classes, such as 'n01', cannot be matched to exactly one "
         "of the checkpoint's: the data has 2 ('n01', 'bee'); the checkpoint has 2 ('ant', 'bee'). "
         "If "),
        (("a",), tuple("xbcdefgh"), "name",
         "the checkpoint has 8 ('x', 'b', 'c', 'd', 'e', ...). If they are the same in the same "
         "order under other names, use --labels=index"),
        (("crane",), ("crane", "eel", "crane"), "name", "1 of the data's classes, such as 'crane'"),
        (("eel", "eel"), ("eel", "fox"), "name", "2 of the data's classes, such as 'eel'"),
        (("a", "b"), ("a", "b", "c"), "index",
         "--labels=index needs the same number of classes: the data has 2 ('a', 'b'); the "
         "checkpoint has 3 ('a', 'b', 'c'). Use --labels=name."),
        (("x", "y"), ("a", "b", "c"), "index",
         "--labels=index needs the same number of classes: the data has 2 ('x', 'y'); the "
         "checkpoint has 3 ('a', 'b', 'c'). Use --labels=name."),
        (CLASSES, ("ant", "bee", "cat"), "index",
         "--labels=index: 'cat' is in the data and in the checkpoint, but in another place"),
        # Ten classes that were ordered as text.
        (("0", "1", "2", "10"), ("0", "1", "10", "2"), "index", "'2' is in the data and in the"),
        (("dog", "cat"), ("cat", "hound"), "index", "'cat' is in the data and in the checkpoint"),
    ],
)  # fmt: skip
def test_classes_that_do_not_match_are_shown(class_names, model_names, by, message):
    with pytest.raises(UserError, match=re.escape(message)):
        classes.match(class_names, model_names, by=by)


def test_classes_that_no_flag_can_match_are_shown_without_one():
    with pytest.raises(UserError, match="1 of the data's classes, such as 'a', cannot") as error:
        classes.match_names(("a", "b"), ("b", "c"))
    assert "the data has 2 ('a', 'b'); the checkpoint has 2 ('b', 'c')." in str(error.value)
    assert "--" not in str(error.value)


def test_a_split_is_brought_to_the_classes_of_another(caplog):
    train = Examples("train", ("ant", "bee", "cat"), [0, 1, 2])
    same = Examples("test", ("ant", "bee", "cat"), [2])
    assert classes.align(train, same) is same
    test = classes.align(train, Examples("test", ("cat", "bee"), [0, 1, 0]))
    assert test.class_names == train.class_names
    assert test.labels().tolist() == [2, 1, 2] and test.labels().dtype == np.int32
    assert [test.read(i)[1] for i in range(3)] == [2, 1, 2]
    assert test.class_counts().tolist() == [0, 1, 2]
    assert "Split 'test' has no images of 1 of the 3 classes: ant." in caplog.text


def test_a_label_that_is_not_a_class_stays_none():
    train = Examples("train", ("ant", "bee"), [0, 1])
    test = classes.align(train, Examples("test", ("bee", "ant"), [-1, 0]))
    assert [test.read(i)[1] for i in range(2)] == [-1, 1]


def test_new_classes_are_refused():
    train = Examples("train", ("ant", "bee"), [0, 1])
    message = r"'test' has other classes than 'train': \['ant'\] are missing, \['cat'\] are new"
    with pytest.raises(UserError, match=message):
        classes.align(train, Examples("test", ("bee", "cat"), [0, 1]))
