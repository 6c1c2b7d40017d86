"""Sources with the same images, classes and order give the same training batches, bit for bit."""

import csv
import functools
import itertools
import pathlib

import numpy as np
import pytest

from vitcls.data import images, loader, sources

CROP = functools.partial(
    images.random_resized_crop,
    size=(8, 6), scale=(0.2, 1), ratio=(3 / 4, 4 / 3), resample="bicubic",
)  # fmt: skip


@pytest.fixture(scope="module")
def records(digits_dir) -> sources.Split:
    """The digits from tfds, in the order of classes, which is that of folders."""
    split = sources.open_split("digits", "test", data_dir=digits_dir)
    return sources.Subset("test", split, indices=np.argsort(split.labels(), kind="stable"))


@pytest.fixture(scope="module")
def root(records, tmp_path_factory) -> pathlib.Path:
    """The same as files, `test/CLASS/NUMBER.png`."""
    root = tmp_path_factory.mktemp("digits")
    for index in range(len(records)):
        data, label = records.read(index)
        path = root / "test" / records.class_names[label] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def open_folder(root: pathlib.Path, records: sources.Split) -> sources.Split:
    return sources.open_split(f"folder:{root}", "test")


def open_csv(root: pathlib.Path, records: sources.Split) -> sources.Split:
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "filename", "label"])
        for path in sorted(root.glob("*/*/*.png"), key=lambda path: path.name[::-1]):
            writer.writerow(["test", path.relative_to(root), path.parent.name])
    return sources.open_split(f"csv:{root}/labels.csv", "test")


def open_hf(root: pathlib.Path, records: sources.Split) -> sources.Split:
    datasets = pytest.importorskip("datasets")
    data, labels = zip(*(records.read(index) for index in range(len(records))), strict=True)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(records.class_names))}
    )
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": one, "path": None} for one in data], "label": labels}, features
    )
    (root / "parquet").mkdir(exist_ok=True)
    table.to_parquet(root / "parquet/test-00000-of-00001.parquet")
    return sources.open_split(f"hf:{root}/parquet", "test")


def thinned(split: sources.Split, division: str) -> sources.Split:
    rest, _ = sources.take_fold(split, 2, 5, seed=1, division=division)
    return sources.take_long_tail(rest, 3, seed=1, division=division)


def assert_same_batches(split: sources.Split, other: sources.Split, sampling: str) -> None:
    def batches(of):
        made = loader.train_batches(
            of, global_batch_size=32, start_step=0, total_steps=8, seed=1, transform=CROP,
            num_threads=2, sampling=sampling,
        )  # fmt: skip
        return list(made)

    assert split.class_names == other.class_names
    for batch, expected in itertools.zip_longest(batches(split), batches(other)):
        assert batch.keys() == expected.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize("open_source", [open_folder, open_csv, open_hf])
@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_batches_do_not_depend_on_the_source(records, root, open_source, sampling):
    split = open_source(root, records)
    assert_same_batches(split, records, sampling)
    both = (thinned(one, "position") for one in (split, records))
    assert_same_batches(*both, sampling)


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_what_is_held_out_and_taken_depends_on_ids_alone(records, root, sampling):
    # Of a folder and a CSV file ids are the same paths.
    opened = open_folder(root, records), open_csv(root, records)
    folder, table = (thinned(split, "hash") for split in opened)
    np.testing.assert_array_equal(folder.hashes(), table.hashes())
    assert_same_batches(folder, table, sampling)
