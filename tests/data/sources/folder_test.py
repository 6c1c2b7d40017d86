"""Folders of images: what is listed, how it is divided, and every way in which one is unusable."""

import errno
import functools
import io
import os
import pathlib
import pickle
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from vitcls.config.fields import default_config
from vitcls.data import images, loader, sources
from vitcls.data.sources.folder import FolderSplit
from vitcls.errors import StorageError, UserError
from vitcls.run.splits import open_splits


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(root: pathlib.Path, *paths: str, content: bytes | None = None) -> None:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(number) if content is None else content)


@pytest.fixture
def split_root(tmp_path) -> pathlib.Path:
    """train and val of two classes, with nested folders and files that are no images."""
    root = tmp_path / "pets"
    write(root, "train/dog/b.png", "train/dog/a.JPG", "train/cat/z/1.jpeg", "train/cat/2.webp")
    write(root, "val/dog/1.png", "val/cat/1.png")
    write(root, "train/cat/.hidden.png", "train/.cache/1.png", "train/dog/notes.txt", "README.md")
    return root


@pytest.fixture
def class_root(tmp_path) -> pathlib.Path:
    """Classes without split folders: 20, 10 and 5 images."""
    root = tmp_path / "animals"
    for name, count in [("cat", 20), ("dog", 10), ("emu", 5)]:
        write(root, *(f"{name}/{number:02}.png" for number in range(count)))
    return root


def open_folder(root: pathlib.Path | str, split: str = "train") -> sources.Split:
    return sources.open_split(f"folder:{root}", split)


def ids(split: sources.Split) -> list[str]:
    return [split.id(index) for index in range(len(split))]


# --- listing --------------------------------------------------------------------------------------


def test_listing_is_sorted_and_leaves_out_what_is_no_image(split_root):
    train = open_folder(split_root)
    assert train.class_names == ("cat", "dog")
    assert ids(train) == [
        "train/cat/2.webp", "train/cat/z/1.jpeg", "train/dog/a.JPG", "train/dog/b.png",
    ]  # fmt: skip
    assert train.labels().tolist() == [0, 0, 1, 1]
    assert train.labels().dtype == np.int32
    for index, name in enumerate(ids(train)):
        data, label = train.read(index)
        assert data == (split_root / name).read_bytes()
        assert label == train.labels()[index]
    assert ids(open_folder(split_root, "val")) == ["val/cat/1.png", "val/dog/1.png"]


def test_labels_need_no_image(class_root, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("read"))
    assert np.bincount(open_folder(class_root, "test").labels()).tolist() == [4, 2, 1]


def test_links_are_followed(split_root, tmp_path):
    os.rename(split_root / "val", tmp_path / "elsewhere")
    (split_root / "val").symlink_to(tmp_path / "elsewhere")
    (split_root / "val/cat/link.png").symlink_to(split_root / "train/dog/b.png")
    val = open_folder(split_root, "val")
    assert ids(val) == ["val/cat/1.png", "val/cat/link.png", "val/dog/1.png"]
    assert val.read(1)[0] == (split_root / "train/dog/b.png").read_bytes()


def test_a_folder_may_be_reached_twice_but_not_from_within(split_root):
    (split_root / "train/cat/again").symlink_to(split_root / "train/cat/z")
    assert "train/cat/again/1.jpeg" in ids(open_folder(split_root))
    (split_root / "train/cat/z/up").symlink_to(split_root / "train/cat")
    with pytest.raises(UserError, match="z/up is a symbolic link to a folder that it is in"):
        open_folder(split_root)


def test_fingerprints_name_the_listing_not_the_place(split_root, tmp_path):
    train = open_folder(split_root)
    copy = tmp_path / "copy"
    shutil.copytree(split_root, copy)
    assert open_folder(copy).fingerprint == train.fingerprint
    assert open_folder(copy, "val").fingerprint != train.fingerprint
    (copy / "train/dog/b.png").write_bytes(png(0) + b"longer")
    longer = open_folder(copy).fingerprint
    os.rename(copy / "train/dog/b.png", copy / "train/dog/c.png")
    assert len({train.fingerprint, longer, open_folder(copy).fingerprint}) == 3


def test_names_that_are_not_unicode_are_read(split_root):
    path = os.fsencode(split_root) + b"/train/dog/\xff.png"
    try:
        pathlib.Path(os.fsdecode(path)).write_bytes(png(7))
    except OSError:
        pytest.skip("this file system has unicode names only")
    train = open_folder(split_root)
    assert train.read(len(train) - 1) == (png(7), 1)


def test_splits_can_be_pickled_and_read_from_another_folder(class_root, monkeypatch):
    monkeypatch.chdir(class_root.parent)
    split = open_folder(class_root.name, "test")
    monkeypatch.chdir("/")
    copy = pickle.loads(pickle.dumps(split))
    assert ids(copy) == ids(split) and copy.fingerprint == split.fingerprint
    assert [copy.read(i) for i in range(7)] == [split.read(i) for i in range(7)]


def test_many_files_are_listed_in_no_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5000):
            (tmp_path / name / f"{number}.jpg").touch()
    started = time.monotonic()
    split = FolderSplit(str(tmp_path))
    assert time.monotonic() - started < 2
    assert len(split) == 10_000
    assert len(pickle.dumps(split)) < 400_000


# --- splits ---------------------------------------------------------------------------------------


def test_folder_without_splits_is_divided_by_class_the_same_in_every_run(class_root):
    train, test = open_folder(class_root), open_folder(class_root, "test")
    assert np.bincount(train.labels()).tolist() == [16, 8, 4]
    assert np.bincount(test.labels()).tolist() == [4, 2, 1]
    assert sorted(ids(train) + ids(test)) == ids(FolderSplit(str(class_root)))
    assert (train.name, test.name) == ("train", "test")
    assert ids(open_folder(class_root, "test")) == ids(test)

    config = default_config()
    config.data.source = f"folder:{class_root}"
    held_out = set()
    for seed in (0, 1):
        config.train.seed = seed
        splits = open_splits(config)[1]
        assert ids(splits["test"]) == ids(test)
        held_out.add(tuple(ids(splits["holdout"])))
    assert len(held_out) == 2


def test_division_and_listing_go_into_the_manifest(class_root, split_root):
    rest, _ = sources.hold_out(open_folder(class_root), 0.2, seed=0)
    assert rest.origin() == {
        "listing_sha256": FolderSplit(str(class_root)).fingerprint,
        "divided": {"fractions": {"train": 0.8, "test": 0.2}, "seed": 2**32, "by": "hash"},
    }
    split_only = open_folder(split_root)
    assert split_only.origin() == {"listing_sha256": split_only.fingerprint}


def test_class_called_like_a_split_is_a_class(tmp_path):
    for name in ("train", "bus"):
        write(tmp_path, *(f"{name}/{number}.png" for number in range(5)))
    assert open_folder(tmp_path, "test").class_names == ("bus", "train")


def test_missing_split_names_those_there_are(split_root):
    with pytest.raises(UserError, match="'trian'. Did you mean 'train'. Known: train, val."):
        open_folder(split_root, "trian")
    message = r"""'test'.* Known: train, val. .*on 'val', set data.eval_splits="\('val',\)"."""
    with pytest.raises(UserError, match=message):
        open_folder(split_root, "test")
    shutil.rmtree(split_root / "val")
    with pytest.raises(UserError, match="Known: train. folder:.*/pets/train is divided into both"):
        open_folder(split_root, "test")


def test_divided_folder_has_no_other_split(class_root):
    with pytest.raises(UserError, match="divided into 'train' and 'test'; there is no 'val'"):
        open_folder(class_root, "val")


@pytest.mark.parametrize(
    ("folders", "offered"),
    [
        ({"Training": "train", "Testing": "test"}, ["test", "train"]),
        ({"TRAIN": "train", "Validation": "validation"}, ["train", "validation"]),
        ({"train_set": "train", "test-images": "test"}, ["test", "train"]),
        (
            {"trainset": "train", "testset": "test", "valset": "val"},
            ["test", "train", "validation"],
        ),
        ({"train2017": "train", "val2017": "val"}, ["train", "validation"]),
        ({"01_train": "train", "02_test": "test"}, ["train", "test"]),
        ({"seg_train": "train", "seg_test": "test"}, ["test", "train"]),
        ({"TrainImages": "training", "TestImages": "testing"}, ["test", "train"]),
        ({"train": "train", "val": "validation", "extra": "extra"}, ["extra", "train", "val"]),
    ],
)
def test_usual_spellings_of_splits_are_recognised(tmp_path, folders, offered):
    for folder in folders:
        write(tmp_path, f"{folder}/cat/1.png", f"{folder}/dog/1.png", f"{folder}/dog/2.png")
    assert sources.split_names(f"folder:{tmp_path}") == offered
    for folder, split in folders.items():
        opened = open_folder(tmp_path, split)
        assert (opened.name, opened.class_names) == (split, ("cat", "dog"))
        assert ids(opened) == [
            f"{folder}/{name}" for name in ("cat/1.png", "dog/1.png", "dog/2.png")
        ]
        assert ids(open_folder(tmp_path, folder)) == ids(opened)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train_a/cat/1.png", "test_b/cat/1.png"], "test_b, train_a look like splits, but"),
        (["x_train/cat/1.png", "x_train/dog/1.png"], "x_train look like splits"),
        (["cats_train/1.png", "cats_test/1.png"], "cats_test, cats_train without classes"),
        (["cat/train/1.png", "cat/test/1.png", "dog/train/1.png", "dog/test/1.png"],
         "the classes are divided into test, train. Put the images into SPLIT/CLASS"),
        (["train/cat/1.png", "train/dog/1.png", "bus/1.png"],
         "train has folders and looks like a split, but bus have images and look like classes"),
        (["pets/train/cat/1.png", "pets/test/cat/1.png"], "try folder:.*/pets"),
    ],
)  # fmt: skip
def test_what_looks_like_splits_is_not_divided_anew(tmp_path, paths, message):
    write(tmp_path, *paths)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_two_folders_of_one_role_are_told_apart(tmp_path):
    for folder in ("train", "Training", "test1", "test2"):
        write(tmp_path, f"{folder}/cat/1.png", f"{folder}/dog/1.png")
    assert ids(open_folder(tmp_path))[0] == "train/cat/1.png"
    with pytest.raises(UserError, match="'test' could be 'test1', 'test2': name one of them"):
        open_folder(tmp_path, "test")
    assert ids(open_folder(tmp_path, "test2"))[0] == "test2/cat/1.png"


def test_a_folder_of_the_splits_name_inside_it_is_seen_through(tmp_path):
    for name in ("sea", "ice"):
        write(tmp_path, f"seg_train/seg_train/{name}/1.png", f"seg_test/seg_test/{name}/1.png")
    train = open_folder(tmp_path)
    assert train.class_names == ("ice", "sea")
    assert ids(train)[0] == "seg_train/seg_train/ice/1.png"


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(11):
        write(tmp_path, f"train/{number}/a.png", f"train/{number}/b.png")
    train = open_folder(tmp_path)
    assert train.class_names == tuple(map(str, range(11)))
    assert train.labels().tolist() == np.repeat(np.arange(11), 2).tolist()
    assert ids(train)[-1] == "train/10/b.png"


def test_a_measuring_split_may_lack_classes(tmp_path, caplog):
    for name in ("cat", "dog", "emu"):
        write(tmp_path, *(f"train/{name}/{number}.png" for number in range(5)))
    write(tmp_path, "test/emu/1.png", "test/dog/notes.txt")
    config = default_config()
    config.data.source = f"folder:{tmp_path}"
    config.eval.select_split = ""
    train, evaluated = open_splits(config)
    assert evaluated["test"].class_names == train.class_names
    assert evaluated["test"].labels().tolist() == [2]
    assert "Split 'test' has no images of 2 of the 3 classes: cat, dog." in caplog.text
    config.data.train_split, config.data.eval_splits = "test", ("train",)
    with pytest.raises(UserError, match="has other classes than 'test'"):
        open_splits(config)


def test_what_was_found_is_said_in_one_line(split_root, class_root, caplog):
    caplog.set_level("INFO", "vitcls")
    assert open_folder(split_root).found in caplog.text
    assert open_folder(split_root, "val").found == (
        f"Splits: train, val. 2 images of 2 classes in {split_root}/val."
    )
    assert "4 images of 2 classes in" in open_folder(split_root).found
    assert "Not used: 1 file .txt (not images) in dog." in open_folder(split_root).found
    assert open_folder(class_root).found == (
        "No split folders: a fifth of every class is 'test'. 35 images of 3 classes in "
        f"{class_root}."
    )
    write(split_root, "docs/readme.txt")
    assert "Not used: docs, without classes." in open_folder(split_root).found


# --- batches --------------------------------------------------------------------------------------


class Records(sources.Split):
    """The same examples as another source would hold them: in memory."""

    def __init__(self, split: sources.Split):
        self.name, self.class_names, self.fingerprint = split.name, split.class_names, "records"
        self._examples = [split.read(index) for index in range(len(split))]

    def __len__(self):
        return len(self._examples)

    def read(self, index):
        return self._examples[index]

    def id(self, index):
        return f"records.array_record__{index}"

    def labels(self):
        return np.array([label for _, label in self._examples], np.int32)


def test_batches_are_those_of_any_other_source_with_the_same_images(class_root):
    folder = open_folder(class_root)
    crop = functools.partial(
        images.random_resized_crop,
        size=(8, 6), scale=(0.2, 1), ratio=(3 / 4, 4 / 3), resample="bicubic",
    )  # fmt: skip
    for split, other in [
        (folder, Records(folder)),
        *zip(
            *(
                sources.hold_out(s, 0.3, seed=0, division="position")
                for s in (folder, Records(folder))
            ),
            strict=True,
        ),
    ]:
        both = [
            loader.train_batches(
                of, global_batch_size=12, start_step=0, total_steps=6, seed=3, num_threads=2,
                transform=crop,
            )
            for of in (split, other)
        ]  # fmt: skip
        for batch, expected in zip(*both, strict=True):
            for name in batch:
                np.testing.assert_array_equal(batch[name], expected[name])


# --- mistakes -------------------------------------------------------------------------------------


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="data.source: .*/nowhere does not exist."):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="'folder:' names no folder"):
        open_folder("")
    write(tmp_path, "images.zip")
    with pytest.raises(UserError, match="data.source: .*/images.zip is a file, not a folder."):
        open_folder(tmp_path / "images.zip")


def test_folder_without_classes_is_refused(tmp_path, split_root):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images and no folders; put the images into"):
        open_folder(tmp_path / "empty")
    write(tmp_path / "flat", "1.png", "2.png")
    with pytest.raises(UserError, match="flat has 2 images and no folders"):
        open_folder(tmp_path / "flat")
    write(split_root, "test/1.png")
    with pytest.raises(UserError, match="pets/test has 1 images and no folders"):
        open_folder(split_root, "test")


def test_splits_without_classes_are_not_taken_for_classes(tmp_path):
    write(tmp_path, "train/1.png", "train/2.png", "test/1.png", "test/2.png")
    with pytest.raises(UserError, match="has the splits test, train without classes; put their"):
        open_folder(tmp_path)


def test_images_beside_the_classes_are_mentioned(split_root, caplog):
    write(split_root, "val/montage.png")
    write(split_root, "train/montage.png")
    assert len(open_folder(split_root, "val")) == 2
    assert "1 images directly in" in caplog.text


def test_class_without_images_is_named(class_root):
    write(class_root, "fox/notes.txt")
    with pytest.raises(UserError, match="no images in 1 of 4 classes: fox. Put images there"):
        open_folder(class_root)


def test_a_single_class_is_refused(tmp_path):
    write(tmp_path, "cat/1.png", "cat/2.png")
    with pytest.raises(UserError, match="one class only, 'cat'; there must be two or more"):
        open_folder(tmp_path)


def test_class_with_one_image_cannot_be_divided(class_root):
    write(class_root, "fox/1.png")
    with pytest.raises(UserError, match="'fox' has one image only; data without splits are"):
        open_folder(class_root)


def test_splits_with_different_classes_are_refused(split_root):
    write(split_root, "test/dog/1.png", "test/emu/1.png")
    config = default_config()
    config.data.source = f"folder:{split_root}"
    config.eval.select_split = ""
    message = r"'test' has other classes than 'train': \['cat'\] are missing, \['emu'\] are new"
    with pytest.raises(UserError, match=message):
        open_splits(config)


@pytest.mark.parametrize("target", ["nothing", "link.png"])
def test_broken_links_are_named(split_root, target):
    (split_root / "train/dog/link.png").symlink_to(target)
    with pytest.raises(UserError, match="dog/link.png is a .*(broken|to itself).*; remove it"):
        open_folder(split_root)


def test_folder_without_permission_is_named(split_root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if path.endswith("dog"):  # a test may run as root, whom modes do not stop
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="train/dog cannot be listed: no permission."):
        open_folder(split_root)


def test_disk_that_fails_is_no_mistake_of_the_user(split_root, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(StorageError, match="Cannot list .*pets: Input/output error."):
        open_folder(split_root)


def test_image_without_permission_or_gone_is_named(split_root, monkeypatch):
    train = open_folder(split_root)
    (split_root / "train/dog/b.png").unlink()
    with pytest.raises(StorageError, match="Cannot read .*train/dog/b.png, which was there at the"):
        train.read(3)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="No permission to read .*train/cat/2.webp."):
        train.read(0)
