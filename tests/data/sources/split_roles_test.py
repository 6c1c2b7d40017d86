"""Names of splits and columns that tell them: what is recognised, and what is refused."""

import pytest

from vitcls.data.sources import split_roles
from vitcls.errors import UserError


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train", "train"), ("Training", "train"), ("TRAIN_SET", "train"), ("trainset", "train"),
        ("train-images", "train"), ("TrainData", "train"), ("train2017", "train"),
        ("01 train", "train"),
        ("val", "validation"), ("Validation", "validation"), ("dev", "validation"),
        ("eval", "validation"), ("testing", "test"), ("Test_Images", "test"), ("tst", "test"),
        ("trained", ""), ("contest", ""), ("bullet_train", ""), ("train_test", ""), ("cat", ""),
        ("", ""), ("set", ""), ("latest", ""), ("valid_train", ""),
    ],
)  # fmt: skip
def test_roles(name, role):
    assert split_roles.role_of(name) == role


def test_names_that_differ_in_the_role_only_are_recognised_together():
    assert split_roles.find_roles(["seg_train", "seg_test", "seg_pred"]) == {
        "seg_train": "train", "seg_test": "test",
    }  # fmt: skip
    assert split_roles.find_roles(["bullet_train", "steam_train"]) == {}
    assert split_roles.find_suspects(["bullet_train", "bus"]) == ["bullet_train"]


def test_splits_are_offered_by_their_usual_names():
    assert split_roles.offered(["Training", "valid", "Testing"]) == {
        "train": "Training", "valid": "valid", "test": "Testing",
    }  # fmt: skip
    assert split_roles.offered(["train", "test1", "test2"]) == {
        "train": "train", "test1": "test1", "test2": "test2",
    }  # fmt: skip
    assert split_roles.offered(["A", "B"]) == {"A": "A", "B": "B"}


def test_any_spelling_finds_the_only_split_of_its_role():
    names = ["Training", "valid"]
    assert [split_roles.find("split", one, names) for one in ("train", "Training", "val")] == [
        "Training", "Training", "valid",
    ]  # fmt: skip
    with pytest.raises(UserError, match="Unknown split 'test'. Known: train, valid."):
        split_roles.find("split", "test", names)


def column(**columns: set[str]) -> str:
    columns = {name.replace("__", " "): values for name, values in columns.items()}
    return split_roles.find_column("x.csv", "csv:x.csv?split=", columns)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"split": {"train", "test"}}, "split"),
        ({"subset": {"A", "B"}}, "subset"),
        ({"data__set": {"train", "test"}}, "data set"),
        ({"set": {"Training", "Testing"}}, "set"),
        ({"Usage": {"Training", "PublicTest", "PrivateTest"}}, "Usage"),
        ({"phase": {"train"}}, "phase"),
        ({"whatever": {"train", "val"}}, "whatever"),
        ({"is_valid": {"True", "False"}}, "is_valid"),
        ({"is_test": {"0", "1"}}, "is_test"),
        ({"train": {"yes", "no"}}, "train"),
        ({"dataset": {"imagenet", "web"}}, ""),
        ({"note": {"a", "b"}, "width": set()}, ""),
        ({"vehicle": {"train"}}, ""),
        ({"is_valid": {"True"}}, ""),
    ],
)
def test_the_column_of_splits_is_found(columns, expected):
    assert column(**columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"fold": {"0", "1"}}, "column 'fold' seems to divide the images, but its values 0, 1 do"),
        ({"set": {"A", "B"}}, "Say csv:x.csv.split=set to have splits of these names, or"),
        ({"split": {"train", "test"}, "phase": {"train", "val"}},
         "columns 'split', 'phase' could all tell the splits; choose one: csv:x.csv.split=split"),
    ],
)  # fmt: skip
def test_columns_that_say_nothing_or_too_much_are_refused(columns, message):
    with pytest.raises(UserError, match=message):
        column(**columns)


def test_yes_and_no_become_splits():
    assert split_roles.flag_role("is_valid", ["True", "False"]) == "validation"
    assert [split_roles.flag_split("validation", value) for value in ("True", "0")] == [
        "validation", "train",
    ]  # fmt: skip
    assert [split_roles.flag_split("train", value) for value in ("yes", "no")] == ["train", "test"]
