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

from vitcls.data import hf_split, sources
from vitcls.errors import UserError

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
    monkeypatch.setattr(hf_split, "_load", lambda source: tables)


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
