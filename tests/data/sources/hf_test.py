"""Data sets in the formats of the Hugging Face hub, all on disk."""

import concurrent.futures
import io
import multiprocessing
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from vitcls.config.fields import default_config
from vitcls.data import sources
from vitcls.data.sources import hf
from vitcls.errors import UserError
from vitcls.run.splits import open_splits

datasets = pytest.importorskip("datasets")
NAMES = ["cat", "ant", "bee"]  # the data set's order, not the alphabet's


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def make_table(num: int, *, first: int = 0, label=None, **columns) -> "datasets.Dataset":
    """Images of different grey levels with labels 0, 1, 2, 0, 1, ..."""
    content = {
        "note": ["?"] * num,
        "image": [{"bytes": png(first + row), "path": f"{row}.png"} for row in range(num)],
        "label": [row % 3 for row in range(num)],
    }
    features = {
        "note": datasets.Value("string"),
        "image": datasets.Image(),
        "label": label or datasets.ClassLabel(names=NAMES),
    }
    for name, (values, feature) in columns.items():
        content[name], features[name] = values[:num], feature
    return datasets.Dataset.from_dict(content, datasets.Features(features))


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A folder of Parquet files: 20 training images in two, 6 test images in one."""
    root = tmp_path / "parquet"
    root.mkdir()
    make_table(12).to_parquet(root / "train-00000-of-00002.parquet")
    make_table(8, first=12).to_parquet(root / "train-00001-of-00002.parquet")
    make_table(6, first=100).to_parquet(root / "test-00000-of-00001.parquet")
    return root


def open_hf(source: pathlib.Path | str, split: str = "train") -> sources.Split:
    return sources.open_split(f"hf:{source}", split)


def in_memory(monkeypatch, **tables: "datasets.Dataset") -> None:
    """Lets every source have these splits."""
    monkeypatch.setattr(hf, "_load", lambda source: tables)


def check_train(train: sources.Split) -> None:
    assert train.class_names == tuple(NAMES)
    assert [train.read(row) for row in range(20)] == [
        (png(row), label) for row, label in enumerate([*np.arange(12) % 3, *np.arange(8) % 3])
    ]
    assert train.labels().dtype == np.int32
    assert train.labels().tolist() == [train.read(row)[1] for row in range(20)]


def test_parquet_files_are_read_in_order_with_their_bytes(root):
    train = open_hf(root)
    check_train(train)
    assert [train.id(row) for row in (0, 19)] == ["train/0", "train/19"]
    assert open_hf(root, "test").read(5) == (png(105), 2)
    assert sources.split_names(f"hf:{root}") == ["train", "test"]
    assert train.image(7)[0].getpixel((0, 0)) == (7, 0, 0)


def test_what_save_to_disk_writes_is_read(tmp_path):
    whole = datasets.concatenate_datasets([make_table(12), make_table(8, first=12)])
    datasets.DatasetDict({"train": whole, "test": make_table(3)}).save_to_disk(tmp_path / "saved")
    check_train(open_hf(tmp_path / "saved"))
    whole.save_to_disk(tmp_path / "single")
    train, test = (open_hf(tmp_path / "single", split) for split in ("train", "test"))
    assert np.bincount(test.labels()).tolist() in ([2, 1, 1], [1, 2, 1], [1, 1, 2])
    ids = [part.id(row) for part in (train, test) for row in range(len(part))]
    assert sorted(ids) == sorted(f"train/{row}" for row in range(20))
    assert sources.split_names(f"hf:{tmp_path}/single") == ["train", "test"]


def test_one_parquet_file_is_divided(root):
    path = root / "train-00000-of-00002.parquet"
    assert len(open_hf(path)) + len(open_hf(path, "test")) == 12


def test_folders_of_images_are_read_from_their_files(tmp_path):
    for row in range(9):
        path = tmp_path / "images" / ("train" if row < 6 else "test") / f"{'ab'[row % 2]}/{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(row))
    train = open_hf(tmp_path / "images")
    assert train.class_names == ("a", "b")
    assert [train.read(row)[0] for row in range(6)] == [png(row) for row in (0, 2, 4, 1, 3, 5)]


def test_threads_and_processes_read_the_same(root):
    train = open_hf(root)
    expected = [train.read(row) for row in range(20)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(train.read, [*range(20)] * 20)) == expected * 20
    pickled = pickle.dumps(train)
    assert len(pickled) < 20_000 < sum(len(one) for one, _ in expected) * 20
    copy = pickle.loads(pickled)
    assert [copy.read(row) for row in range(20)] == expected
    assert copy.fingerprint == train.fingerprint
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(train.read, range(20)) == expected


def test_fingerprints_name_the_content_not_the_place_or_the_format(root, tmp_path):
    train = open_hf(root)
    shutil.copytree(root, tmp_path / "copy")
    assert open_hf(tmp_path / "copy").fingerprint == train.fingerprint
    whole = datasets.concatenate_datasets([make_table(12), make_table(8, first=12)])
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "saved")
    assert open_hf(tmp_path / "saved").fingerprint == train.fingerprint
    fingerprints = {train.fingerprint}
    for number, changed in enumerate(
        (whole.select(range(19)), whole.select([1, 0, *range(2, 20)]),
         whole.cast_column("label", datasets.ClassLabel(names=["cat", "ant", "bug"])))
    ):  # fmt: skip
        path = tmp_path / f"changed{number}"
        datasets.DatasetDict({"train": changed, "test": whole}).save_to_disk(path)
        fingerprints.add(open_hf(path).fingerprint)
    assert len(fingerprints) == 4


def test_labels_without_names_are_names(monkeypatch):
    colors = datasets.Value("string")
    train = make_table(4).remove_columns("label").add_column("label", ["red", "blue", "red", "tan"])
    in_memory(monkeypatch, train=train.cast_column("label", colors), test=train.select([0, 1]))
    assert open_hf("x").class_names == open_hf("x", "test").class_names == ("blue", "red", "tan")
    assert open_hf("x").labels().tolist() == [1, 0, 1, 2]
    in_memory(monkeypatch, train=make_table(6, label=datasets.Value("int64")), test=make_table(3))
    assert open_hf("x").class_names == ("0", "1", "2")


def test_every_split_has_its_own_numbers_of_the_classes(tmp_path):
    train = make_table(9)
    test = make_table(6, label=datasets.ClassLabel(names=["bee", "ant", "cat"]))
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    opened = {split: open_hf(tmp_path / "saved", split) for split in ("train", "test")}
    for split, names in (("train", NAMES), ("test", ["bee", "ant", "cat"])):
        one = opened[split]
        assert one.class_names == tuple(NAMES)  # the first split's, then what others add
        assert [one.class_names[label] for label in one.labels()] == names * (len(one) // 3)
    fewer = make_table(2, label=datasets.ClassLabel(names=["bee", "ant"]))
    datasets.DatasetDict(train=train, test=fewer).save_to_disk(tmp_path / "fewer")
    assert open_hf(tmp_path / "fewer", "test").class_counts().tolist() == [0, 1, 1]


def test_a_split_without_labels_does_not_keep_others_from_being_used(monkeypatch):
    table = make_table(6).remove_columns("label")
    for kind, labels in ((datasets.Value("string"), NAMES), (datasets.Value("int64"), [0, 1, 2])):
        train = table.add_column("label", labels * 2).cast_column("label", kind)
        in_memory(monkeypatch, train=train, test=table)
        assert len(open_hf("x")) == 6
        with pytest.raises(
            UserError, match="hf:x: split 'test' has no column that could be the la"
        ):
            open_hf("x", "test")


def test_columns_may_differ_from_split_to_split(monkeypatch):
    test = make_table(3).rename_columns({"image": "picture", "label": "species"})
    in_memory(monkeypatch, train=make_table(6), test=test)
    assert [open_hf("x", "test").read(row) for row in range(3)] == [
        open_hf("x").read(row) for row in range(3)
    ]
    named = make_table(3).remove_columns("label").add_column("label", ["bee", "cat", "bee"])
    in_memory(monkeypatch, train=make_table(6), test=named)
    assert open_hf("x", "test").class_names == ("bee", "cat")
    config = default_config()
    config.data.source, config.eval.select_split = "hf:x", ""
    train, evaluated = open_splits(config)
    assert train.class_names == tuple(NAMES)
    assert evaluated["test"].labels().tolist() == [2, 0, 2]


def test_numbers_written_as_texts_are_in_the_order_of_their_values(monkeypatch):
    labels = [str(row % 11) for row in range(22)]
    table = make_table(22).remove_columns("label").add_column("label", labels)
    in_memory(monkeypatch, train=table, test=table)
    assert open_hf("x").class_names == tuple(map(str, range(11)))
    floats = make_table(6).remove_columns("label").add_column("label", [0.0, 1.0] * 3)
    in_memory(monkeypatch, train=floats, test=floats)
    assert open_hf("x").class_names == ("0", "1")


@pytest.mark.parametrize("missing", ["nan", "None", "NA"])
def test_texts_that_stand_for_no_label_are_not_classes(monkeypatch, missing):
    labels = ["a", "b", "a", "b", "a", missing]
    table = make_table(6).remove_columns("label").add_column("label", labels)
    in_memory(monkeypatch, train=table, test=table)
    with pytest.raises(
        UserError, match=f"rows with the label '{missing}', which stands for a miss"
    ):
        open_hf("x")


def test_splits_of_other_spellings_are_found(monkeypatch):
    in_memory(monkeypatch, Training=make_table(6), Test=make_table(3))
    assert sources.split_names("hf:x") == ["train", "test"]
    train = open_hf("x")
    assert (train.name, train.id(0), len(train)) == ("train", "Training/0", 6)
    assert len(open_hf("x", "test")) == 3


def test_a_column_of_splits_is_used(monkeypatch):
    splits = (["train", "train", "test"] * 3, datasets.Value("string"))
    in_memory(monkeypatch, train=make_table(9, part=splits))
    assert sources.split_names("hf:x") == ["train", "test"]
    train, test = open_hf("x"), open_hf("x", "test")
    assert [train.id(row) for row in range(6)] == [f"train/{row}" for row in (0, 1, 3, 4, 6, 7)]
    assert [test.id(row) for row in range(3)] == [f"train/{row}" for row in (2, 5, 8)]
    assert "Splits by column 'part': train, test. 3 images of 3" in test.found
    flags = ([False, False, True] * 3, datasets.Value("bool"))
    in_memory(monkeypatch, train=make_table(9, is_valid=flags))
    assert sources.split_names("hf:x") == ["train", "validation"]
    folds = ([0, 1, 2] * 3, datasets.Value("int64"))
    in_memory(monkeypatch, train=make_table(9, fold=folds))
    with pytest.raises(UserError, match="column 'fold' seems to divide the images, but its values"):
        open_hf("x")
    assert len(open_hf("x?split=fold", "2")) == 3
    assert len(open_hf("x?split=")) + len(open_hf("x?split=", "test")) == 9
    gaps = (["train", None, "test"] * 3, datasets.Value("string"))
    in_memory(monkeypatch, train=make_table(9, split=gaps))
    with pytest.raises(UserError, match="Row 1 has nothing in column 'split', which names the spl"):
        open_hf("x")
    in_memory(monkeypatch, train=make_table(9, fold=folds))
    with pytest.raises(UserError, match="Unknown column of hf:x 'flod'. Did you mean 'fold'"):
        open_hf("x?split=flod")
    in_memory(monkeypatch, train=make_table(6), test=make_table(3))
    with pytest.raises(UserError, match="it has the splits train, test; a column is for data with"):
        open_hf("x?split=note")


def test_folders_whose_file_names_would_lose_rows_are_refused(tmp_path):
    for row, name in enumerate(["my_train_set", "cat", "dog", "train"] * 3):
        path = tmp_path / "images" / f"{'ab'[row % 2]}/{name}_{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(row))
    with pytest.raises(
        UserError, match="6 of 12 files are in none of the splits train, such as a/d"
    ):
        open_hf(tmp_path / "images")
    (tmp_path / "images/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: '*/*.png'\n---\n"
    )
    assert len(open_hf(tmp_path / "images")) + len(open_hf(tmp_path / "images", "test")) == 12


def test_columns_are_named_where_several_could_be_meant(monkeypatch):
    coarse = ([0] * 6, datasets.ClassLabel(names=["animal", "thing"]))
    in_memory(monkeypatch, train=make_table(6, coarse=coarse), test=make_table(3, coarse=coarse))
    with pytest.raises(UserError, match="several columns that could be the label, of note, image"):
        open_hf("some/data")
    assert open_hf("some/data?label=coarse", "test").class_names == ("animal", "thing")
    with pytest.raises(UserError, match="Unknown column of hf:some/data 'coarze'. Did you mean"):
        open_hf("some/data?label=coarze")
    with pytest.raises(UserError, match="Unknown column option of hf:some/data 'lable'"):
        open_hf("some/data?lable=coarse")
    in_memory(monkeypatch, train=make_table(6).remove_columns("image"), test=make_table(3))
    with pytest.raises(UserError, match="no column that could be the image, of note, label"):
        open_hf("some/data")
    in_memory(monkeypatch, train=make_table(6).remove_columns("label"), test=make_table(3))
    with pytest.raises(UserError, match="no column that could be the label"):
        open_hf("some/data")


def test_rows_that_cannot_be_used_are_named(monkeypatch):
    table = make_table(6)
    rows = table.to_dict()
    rows["label"][4] = None
    rows["image"][2] = None
    features = table.features
    broken = datasets.Dataset.from_dict(rows, features)
    in_memory(monkeypatch, train=broken, test=table)
    with pytest.raises(UserError, match="Row 4 of split 'train' has no label"):
        open_hf("x")
    in_memory(monkeypatch, train=broken.select(range(4)), test=table)
    with pytest.raises(UserError, match="Row 2 of split 'train' has no image"):
        open_hf("x")
    table = table.remove_columns("image").rename_column("note", "image")
    in_memory(monkeypatch, train=table, test=table)
    with pytest.raises(UserError, match="Row 0 of split 'train' has no image: \\?: No such file"):
        open_hf("x?image=image")
    many = make_table(3, tags=([[0, 1]] * 3, datasets.List(datasets.Value("int64"))))
    in_memory(monkeypatch, train=many, test=table)
    with pytest.raises(UserError, match="Column 'tags' has not one label per image"):
        open_hf("x?label=tags")


def test_what_is_not_there_is_named(root, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="Unknown split of hf:.*parquet 'tset'. Did you mean 'test'"
    ):
        open_hf(root, "tset")
    with pytest.raises(UserError, match="'hf:' names no data set"):
        open_hf("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="hf:.*/empty cannot be opened: "):
        open_hf(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package `datasets`.* -r requirements-hf.txt"):
        open_hf("some/data")
