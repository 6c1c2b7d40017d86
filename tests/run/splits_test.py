"""The splits of a run: what is held out, thinned, and kept apart."""

import re

import numpy as np
import pytest

from tests.run.configs import make_config
from vitcls.errors import UserError
from vitcls.run import splits


def test_nothing_is_held_out_for_nobody(digits_dir):
    config = make_config("x")
    config.data.data_dir = digits_dir
    assert len(splits.open_splits(config)[0]) == 1437 - 144
    config.eval.select_split = ""
    train_split, evaluated = splits.open_splits(config)
    assert len(train_split) == 1437
    assert set(evaluated) == {"test"}


def test_fold_and_long_tail_make_the_splits_of_a_run(digits_dir):
    config = make_config("x")
    config.data.update(data_dir=digits_dir, fold="2/5", long_tail=10.0)
    train_split, evaluated = splits.open_splits(config)
    assert len(evaluated["holdout"]) in (1437 // 5, 1437 // 5 + 1)
    assert len(evaluated["test"]) == 360
    counts = np.bincount(train_split.labels())
    assert counts[0] // counts[9] == 10
    assert (np.diff(counts) < 0).all()
    held = {evaluated["holdout"].id(i) for i in range(len(evaluated["holdout"]))}
    assert not held & {train_split.id(i) for i in range(len(train_split))}


@pytest.mark.parametrize("fields", [{"fold": "1/5", "long_tail": 10.0}, {"per_class": 9}], ids=str)
def test_what_is_held_out_and_taken_follows_the_seed(digits_dir, fields):
    config = make_config("x")
    config.data.update(data_dir=digits_dir, **fields)

    def ids(seed):
        config.train.seed = seed
        train_split, evaluated = splits.open_splits(config)
        return [
            {split.id(i) for i in range(len(split))}
            for split in (train_split, evaluated["holdout"])
        ]

    first, again, other = ids(0), ids(0), ids(1)
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert len(one) == len(two) and len(one & two) < 0.7 * len(one)


def test_selection_on_images_of_the_test_split_is_refused(digits_dir):
    config = make_config("x")
    config.data.data_dir = digits_dir
    config.eval.select_split = "test[:50%]"
    with pytest.raises(UserError, match="shares images with 'test' of data.eval_splits"):
        splits.open_splits(config)
    config.data.eval_splits = ("test[50%:]",)
    assert len(splits.open_splits(config)[1]) == 2


@pytest.mark.parametrize(
    ("train_split", "select", "evaluated", "message"),
    [
        (
            "train",
            "train[90%:]",
            "test",
            "'train[90%:]' of eval.select_split shares 144 of its 144 ",
        ),
        ("train", "", "train[:10]", "'train[:10]' of data.eval_splits shares 10 of its 10 images"),
        ("train+test", "", "test", "'test' of data.eval_splits shares 360 of its 360 images"),
        ("train[:50%]", "train[40%:60%]", "test", "shares 143 of its 287 images with data.train_"),
    ],
)
def test_images_that_are_trained_on_are_refused_elsewhere(
    digits_dir, caplog, monkeypatch, train_split, select, evaluated, message
):
    monkeypatch.setattr(splits.log, "propagate", True)
    config = make_config("x")
    config.data.update(data_dir=digits_dir, train_split=train_split, eval_splits=(evaluated,))
    config.eval.select_split = select
    with pytest.raises(UserError, match=re.escape(message)):
        splits.open_splits(config)
    splits.open_splits(config, is_continued=True)
    assert message in caplog.text and "The run began so, and continues." in caplog.text


def test_splits_of_other_images_are_accepted(digits_dir):
    config = make_config("x")
    config.data.update(data_dir=digits_dir, train_split="train[:90%]")
    config.eval.select_split = "train[90%:]"
    train_split, evaluated = splits.open_splits(config)
    assert (len(train_split), len(evaluated["train[90%:]"])) == (1293, 144)


def test_a_class_without_training_images_is_refused(tmp_path):
    lines = ["image,label,split"]
    for label in ("ant", "bee", "cat"):
        for number in range(4):
            (tmp_path / f"{label}{number}.png").write_bytes(b"never read")
            split = "test" if label == "cat" or number == 3 else "train"
            lines.append(f"{label}{number}.png,{label},{split}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    config = make_config("x")
    config.data.source, config.eval.select_split = f"csv:{tmp_path}/list.csv", ""
    message = "train: 1 of 3 classes have no images to train on: cat. Add images"
    with pytest.raises(UserError, match=message):
        splits.open_splits(config)
