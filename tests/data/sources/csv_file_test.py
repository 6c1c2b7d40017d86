"""CSV files: columns, labels, splits, and every way in which a line is unusable."""

import io
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from vitcls.data import sources
from vitcls.errors import UserError


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def ids(split: sources.Split) -> list[str]:
    return [split.id(index) for index in range(len(split))]


def open_csv(source: pathlib.Path | str, split: str = "train") -> sources.Split:
    return sources.open_split(f"csv:{source}", split)


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """20 cats, 10 dogs and 5 emus in folders."""
    root = tmp_path / "animals"
    for name, count in [("cat", 20), ("dog", 10), ("emu", 5)]:
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / f"{name}/{number:02}.png").write_bytes(png(number))
    return root


def write_csv(root: pathlib.Path, header: str, *lines: str) -> pathlib.Path:
    path = root / "labels.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def all_files(root: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.glob("*/*.png"))


def test_list_of_a_folder_is_divided_and_ordered_as_the_folder(root):
    rows = [f"{name.split('/')[0]},{name}" for name in all_files(root)]
    path = write_csv(root, "label,image", *rows[::-1])
    for split in ("train", "test"):
        listed, folder = open_csv(path, split), sources.open_split(f"folder:{root}", split)
        assert listed.class_names == folder.class_names == ("cat", "dog", "emu")
        assert ids(listed) == ids(folder)
        np.testing.assert_array_equal(listed.labels(), folder.labels())
        assert [listed.read(i) for i in range(7)] == [folder.read(i) for i in range(7)]
    assert listed.labels().dtype == np.int32
    assert sources.split_names(f"csv:{path}") == sources.split_names(f"folder:{root}")
    copy = pickle.loads(pickle.dumps(listed))
    assert ids(copy) == ids(listed) and copy.read(6) == listed.read(6)


@pytest.mark.parametrize(
    ("header", "query"),
    [
        ("file_name,label", ""),
        ("Filename;Category", ""),
        ("\ufeffpath\tTARGET", ""),
        ('"Image","class"', ""),
        ("picture,species", "?image=picture&label=Species"),
        ("path,species", "?label=species"),
    ],
)
def test_columns_are_found_by_usual_names_or_named(root, header, query):
    delimiter = next(sign for sign in ",;\t" if sign in header)
    rows = [delimiter.join([name, f'"{name[0]}"']) for name in all_files(root)]
    path = write_csv(root, header, *rows)
    assert open_csv(f"{path}{query}").class_names == ("c", "d", "e")


def test_splits_come_from_their_column(root):
    path = write_csv(
        root, "image,split,label", "cat/00.png,train,cat", "dog/01.png,val,dog", "",
        "emu/02.png,train,emu", "./dog/03.png,train,dog",
    )  # fmt: skip
    assert sources.split_names(f"csv:{path}") == ["train", "val"]
    train = open_csv(path)
    assert (train.name, ids(train)) == ("train", ["cat/00.png", "dog/03.png", "emu/02.png"])
    assert open_csv(path, "val").class_names == train.class_names
    assert open_csv(path, "val").labels().tolist() == [1]
    with pytest.raises(UserError, match="Unknown split of .*labels.csv 'vall'. Did you mean 'val'"):
        open_csv(path, "vall")


def test_whole_numbers_are_class_numbers(root):
    rows = [f"{name},{number % 12:02}" for number, name in enumerate(all_files(root))]
    split = open_csv(write_csv(root, "image,label", *rows))
    assert split.class_names == tuple(map(str, range(12)))  # not 0, 1, 10, 11, 2
    for index in range(len(split)):
        assert all_files(root).index(split.id(index)) % 12 == split.labels()[index]


def test_fingerprints_name_the_content_not_the_place(root, tmp_path):
    rows = [f"{name},{name[0]}" for name in all_files(root)]
    path = write_csv(root, "image,label", *rows)
    train = open_csv(path)
    shutil.copytree(root, tmp_path / "copy")
    write_csv(tmp_path / "copy", "label,path", *(",".join(row.split(",")[::-1]) for row in rows))
    copied = tmp_path / "copy/labels.csv"
    assert open_csv(copied).fingerprint == train.fingerprint
    assert open_csv(copied, "test").fingerprint != train.fingerprint
    relabelled = [*rows[:-1], rows[-1].replace(",e", ",d")]
    assert open_csv(write_csv(root, "image,label", *relabelled)).fingerprint != train.fingerprint
    (tmp_path / "copy/dog/03.png").write_bytes(png(0) + b"longer")
    assert open_csv(copied).fingerprint != train.fingerprint


@pytest.mark.parametrize(
    ("column", "values", "splits"),
    [
        ("data set", ["train", "test"], ["train", "test"]),
        ("Set", ["Training", "Testing"], ["train", "test"]),
        ("is_valid", ["False", "True"], ["train", "validation"]),
        ("anything", ["TRAIN", "VAL"], ["train", "validation"]),
    ],
)
def test_columns_of_splits_are_recognised(root, column, values, splits):
    rows = [f"{name},{name[0]},{values[row % 2]}" for row, name in enumerate(all_files(root))]
    path = write_csv(root, f"image,label,{column}", *rows)
    assert sources.split_names(f"csv:{path}") == splits
    opened = [open_csv(path, split) for split in splits]
    assert [ids(split) for split in opened] == [all_files(root)[::2], all_files(root)[1::2]]
    assert f"Splits by column {column!r}: {', '.join(splits)}. 18 images of 3" in opened[0].found


def test_a_list_without_splits_says_which_columns_it_looked_at(root):
    rows = [f"{name},{name[0]},5,x" for name in all_files(root)]
    path = write_csv(root, "image,label,width,note", *rows)
    found = open_csv(path).found
    assert found.startswith("No column of splits among width, note: a fifth of every class is 'te")


def test_splits_are_chosen_or_left_to_us(root):
    rows = [f"{name},{name[0]},{row % 3}" for row, name in enumerate(all_files(root))]
    path = write_csv(root, "image,label,fold", *rows)
    with pytest.raises(
        UserError, match="'fold' seems to divide the images, but its values 0, 1, 2"
    ):
        open_csv(path)
    assert sources.split_names(f"csv:{path}?split=fold") == ["0", "1", "2"]
    assert ids(open_csv(f"{path}?split=fold", "1")) == all_files(root)[1::3]
    assert sources.split_names(f"csv:{path}?split=") == ["train", "test"]
    assert len(open_csv(f"{path}?split=")) + len(open_csv(f"{path}?split=", "test")) == 35


def test_numbers_with_a_point_are_numbers(root):
    rows = [f"{name},{number % 12}.0" for number, name in enumerate(all_files(root))]
    split = open_csv(write_csv(root, "image,label", *rows))
    assert split.class_names == tuple(map(str, range(12)))


@pytest.mark.parametrize("label", ["nan", "NaN", "NA", "N/A", "None", "null", "-1", "<NA>"])
def test_labels_that_stand_for_none_are_not_classes(root, label):
    rows = [f"{name},{name[0]}" for name in all_files(root)]
    path = write_csv(root, "image,label", *rows[:-1], f"{all_files(root)[-1]},{label}")
    message = f"line 36: label '{label}' stands for a missing one. Remove such lines"
    with pytest.raises(UserError, match=message):
        open_csv(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["image,label,split", "cat/00.png,a,train", "cat/01.png,b,Train"],
            "column 'split' has 'Train', 'train', which differ in case only",
        ),
        (["a,b", "x,y"], "has no column called image, image_path.* but a, b; say which one is the"),
        (["path,filename,label", "x,y,z"], "'path', 'filename' could all be the image; choose one"),
        (["image,label"], "labels.csv lists no images"),
        (["image,label", "cat/00.png"], "line 2 has 1 cells, but there are 2 columns"),
        (["image,label", "cat/00.png,a", "cat/01.png, "], "line 3: column 'label' is empty; fill"),
        (["image,label", ",a"], "line 2: column 'image' is empty"),
        (["image,label,split", "cat/00.png,a,"], "line 2: column 'split' is empty"),
        (
            ["image,label", "cat/00.png,a", "", "cat/fog.png,b", "dog/fog.png,b"],
            "line 4: 'cat/fog.png' is not a file in .*animals; 2 of 3 images are missing",
        ),
        (["image,label", "cat/00.png,a", "cat,b"], "line 3: 'cat' is not a file in"),
        (
            ["image,label", "cat/00.png,a", "cat/../cat/00.png,b"],
            "line 3: 'cat/00.png' is already in line 2; list each image once",
        ),
        (["image,label", "cat/00.png,a", "cat/01.png,a"], "has one class only, 'a'"),
        (
            ["image,label", "cat/00.png,1", "cat/01.png,2"],
            "line 2: label 1, but no image has label 0. Number the classes from 0 without gaps",
        ),
        (["image,label", "cat/00.png,a", "cat/01.png,a", "dog/01.png,b"], "'b' has one image only"),
    ],
)
def test_each_mistake_names_file_and_line(root, lines, message):
    with pytest.raises(UserError, match=message):
        open_csv(write_csv(root, *lines))


def test_sources_that_cannot_be_read_are_named(root, tmp_path):
    with pytest.raises(UserError, match="'csv:' names no file"):
        open_csv("")
    with pytest.raises(UserError, match="nowhere.csv cannot be read: No such file"):
        open_csv(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="animals cannot be read: Is a directory"):
        open_csv(root)
    with pytest.raises(UserError, match="00.png is not a CSV file in UTF-8"):
        open_csv(root / "cat/00.png")
    path = write_csv(root, "image,label", "cat/00.png,a")
    with pytest.raises(UserError, match="Unknown column of .*'labl'. Did you mean 'label'"):
        open_csv(f"{path}?label=labl")
    with pytest.raises(UserError, match="Unknown column option of .*'lable'. Did you mean 'label'"):
        open_csv(f"{path}?lable=label")


def test_undivided_list_has_no_other_split(root):
    path = write_csv(root, "image,label", "cat/00.png,a", "dog/00.png,b")
    with pytest.raises(UserError, match="no column of splits, and so is divided into 'train' and"):
        open_csv(path, "val")
