import errno
import fcntl
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import sklearn.model_selection

from vitcls.data import sources
from vitcls.data.sources import builders, prepare
from vitcls.data.sources.labels import cached_labels
from vitcls.errors import StorageError, UserError


@pytest.fixture(scope="module")
def train(digits_dir) -> sources.Split:
    return sources.open_split("digits", "train", data_dir=digits_dir)


@pytest.fixture
def digits_copy(digits_dir, tmp_path) -> pathlib.Path:
    """The folder of a copy of the prepared digits that a test may damage."""
    shutil.copytree(digits_dir, tmp_path / "tfds")
    return tmp_path / "tfds" / "digits" / "1.0.0"


class TenEach(sources.Split):
    """Ten examples of each of three classes, in turn; nothing to read."""

    name, class_names, fingerprint = "train", ("a", "b", "c"), "ten each"

    def __len__(self):
        return 30

    def read(self, index):
        return b"", index % 3

    def id(self, index):
        return f"example {index}"

    def labels(self):
        return np.arange(30, dtype=np.int32) % 3


# --- reading --------------------------------------------------------------------------------------


def test_labels_are_those_of_the_records_and_are_kept(train):
    labels = train.labels()
    assert labels.dtype == np.int32
    assert labels.tolist() == [train.read(i)[1] for i in range(len(train))]
    kept = cached_labels(train.fingerprint, lambda: pytest.fail("read again"))
    np.testing.assert_array_equal(kept, labels)


def test_damaged_label_cache_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vitcls" / "labels"
    folder.mkdir(parents=True)
    for damage in (b"", b"\x93NUMPY", b"text"):
        (folder / "f.npy").write_bytes(damage)
        assert cached_labels("f", lambda: [1, 2]).tolist() == [1, 2]
    assert np.load(folder / "f.npy").tolist() == [1, 2]
    assert os.listdir(folder) == ["f.npy"]


def test_label_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached_labels("f", lambda: [3]).tolist() == [3]


def test_slices_and_sums_of_splits_read_the_same_examples_under_the_same_ids(digits_dir, train):
    test = sources.open_split("digits", "test", data_dir=digits_dir)
    mixed = sources.open_split("digits", "train[10:15]+test[-5:]", data_dir=digits_dir)
    parts = [(train, i) for i in range(10, 15)] + [(test, i) for i in range(355, 360)]
    assert len(mixed) == 10
    assert [mixed.id(i) for i in range(10)] == [part.id(i) for part, i in parts]
    assert [mixed.read(i) for i in range(10)] == [part.read(i) for part, i in parts]
    assert mixed.labels().tolist() == [part.labels()[i] for part, i in parts]


def test_split_ids_are_unique(train):
    assert len({train.id(i) for i in range(len(train))}) == len(train)


def test_fingerprints_name_the_content_not_the_place(digits_copy, train):
    data_dir = str(digits_copy.parents[1])
    assert sources.open_split("digits", "train", data_dir=data_dir).fingerprint == train.fingerprint
    names = ("train", "test", "train[:90%]", "train[10%:]")
    splits = [sources.open_split("digits", name, data_dir=data_dir) for name in names]
    assert len({split.fingerprint for split in splits}) == len(names)


def test_splits_can_be_pickled(train):
    subset = sources.take_per_class(train, 2, seed=0)
    copy = pickle.loads(pickle.dumps(subset))
    assert [copy.read(i) for i in range(20)] == [subset.read(i) for i in range(20)]
    assert copy.fingerprint == subset.fingerprint


def test_reading_and_batching_prepared_data_imports_no_heavy_library(digits_dir):
    code = f"""if True:
        import functools, sys
        from vitcls.data import images, loader, sources
        split = sources.open_split("digits", "train", data_dir={digits_dir!r})
        rest, held = sources.hold_out(split, 0.1, seed=0)
        options = dict(global_batch_size=8, num_threads=1)
        squash = functools.partial(images.squash, size=(8, 8), resample="bilinear")
        next(iter(loader.eval_batches(held, transform=squash, **options)))
        heavy = ("tensorflow", "torch", "transformers", "sklearn")
        sys.exit(" ".join(name for name in heavy if name in sys.modules) or None)
    """
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


# --- mistakes -------------------------------------------------------------------------------------


def test_unknown_source_suggests_the_nearest():
    with pytest.raises(UserError, match="Unknown data source 'digts'. Did you mean 'digits'"):
        sources.open_split("digts", "train")


def test_unknown_tfds_data_set_suggests_the_nearest(tmp_path):
    with pytest.raises(UserError, match="tfds data set 'cifr10'. Did you mean 'cifar10'"):
        sources.open_split("tfds:cifr10", "train", data_dir=str(tmp_path))


def test_unknown_tfds_configuration_is_named(tmp_path):
    with pytest.raises(UserError, match="(?s)tfds:imagenet_v2/x cannot be opened.*BuilderConfig x"):
        sources.open_split("tfds:imagenet_v2/x", "test", data_dir=str(tmp_path))


def test_unknown_tfds_version_is_named(tmp_path):
    with pytest.raises(UserError, match="tfds:cifar10:9.9.9 cannot be opened.*only: 3"):
        sources.open_split("tfds:cifar10:9.9.9", "train", data_dir=str(tmp_path))


def test_unknown_split_suggests_the_nearest(digits_dir):
    message = "Unknown split of digits/1.0.0 'trian'. Did you mean 'train'"
    with pytest.raises(UserError, match=message):
        sources.open_split("digits", "test+trian[:10]", data_dir=digits_dir)


def test_malformed_split_is_refused(digits_dir):
    with pytest.raises(UserError, match="Not a split of digits/1.0.0: .*'train\\[:90'"):
        sources.open_split("digits", "train[:90", data_dir=digits_dir)


@pytest.mark.parametrize("split", ["train[:0]", "train[5:3]"])
def test_empty_split_is_refused(digits_dir, split):
    with pytest.raises(UserError, match="of digits/1.0.0 has no examples"):
        sources.open_split("digits", split, data_dir=digits_dir)


def edit_json(path: pathlib.Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_data_without_random_access_are_refused(digits_copy):
    edit_json(digits_copy / "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    with pytest.raises(UserError, match="prepared as tfrecord, which has no random access"):
        sources.open_split("digits", "train", data_dir=str(digits_copy.parents[1]))


def test_data_without_labels_are_refused(digits_copy):
    edit_json(
        digits_copy / "features.json",
        lambda features: features["featuresDict"]["features"].pop("label"),
    )
    edit_json(digits_copy / "dataset_info.json", lambda info: info.pop("supervisedKeys"))
    with pytest.raises(UserError, match=r"images \['image'\] and labels \[\]; choose a data set"):
        sources.open_split("digits", "train", data_dir=str(digits_copy.parents[1]))


def test_unlabelled_examples_are_refused_when_labels_are_needed(monkeypatch, train):
    monkeypatch.setattr("vitcls.data.sources.tfds.cached_labels", lambda *_: np.array([0, -1]))
    with pytest.raises(UserError, match="'train' has examples without a label"):
        sources.hold_out(train, 0.1, seed=0)


def test_damaged_records_are_storage_errors_that_name_the_example(digits_copy):
    (file,) = digits_copy.glob("digits-train.array_record*")
    data = bytearray(file.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 400)
    data[middle] = bytes(byte ^ 0xFF for byte in data[middle])
    file.write_bytes(data)
    split = sources.open_split("digits", "train", data_dir=str(digits_copy.parents[1]))
    with pytest.raises(StorageError, match=r"Cannot read digits-train.array_record.*__\d+: "):
        [split.read(i) for i in range(len(split))]


# --- preparing ------------------------------------------------------------------------------------


def test_prepared_data_are_not_prepared_again(digits_dir, monkeypatch):
    monkeypatch.setattr(prepare, "_run", lambda *_: pytest.fail("prepared again"))
    builder = prepare.prepare_once("digits", data_dir=digits_dir)
    assert builder.info.splits["test"].num_examples == 360


def test_digits_are_read_where_they_are_shipped_and_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "_run", lambda *_: pytest.fail("prepared"))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert len(sources.open_split("digits", "train", data_dir=str(tmp_path))) == 1437
    assert prepare.prepare("digits", data_dir=str(tmp_path)) is None
    assert not list(tmp_path.iterdir())


def test_digits_that_were_prepared_before_are_read_first(digits_copy, monkeypatch, tmp_path):
    edit_json(
        digits_copy / "dataset_info.json", lambda info: info["splits"][0].update(numBytes="1")
    )
    shipped = sources.open_split("digits", "train", data_dir=str(tmp_path / "none"))
    before = sources.open_split("digits", "train", data_dir=str(digits_copy.parents[1]))
    assert before.fingerprint != shipped.fingerprint


@pytest.mark.parametrize("source", ["glyphs", "tfds:cifar10"])
def test_preparing_asks_for_its_extra_before_any_work(source, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr(prepare, "_run", lambda *_: pytest.fail("prepared"))
    message = f"{source} is not prepared yet, .* pip install -r requirements-tfds.txt. Or copy"
    with pytest.raises(UserError, match=message):
        sources.open_split(source, "train", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=message):
        prepare.prepare(source, data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_another_process_prepared_meanwhile_is_not_prepared_again(monkeypatch, tmp_path):
    answers = iter([False, True])  # before and after waiting for the lock
    monkeypatch.setattr(builders, "is_prepared", lambda builder: next(answers))
    monkeypatch.setattr(prepare, "_run", lambda *_: pytest.fail("prepared again"))
    monkeypatch.setattr(prepare.tfds, "builder_from_directory", lambda folder: "builder")
    assert prepare.prepare_once("glyphs", data_dir=str(tmp_path)) == "builder"


def test_only_one_process_prepares_at_a_time(tmp_path):
    code = f"""if True:
        import pathlib, time
        from vitcls.folders import lock
        with lock.waiting(pathlib.Path({str(tmp_path)!r}) / "lock"):
            print("in", flush=True)
            time.sleep(0.3)
            print("out", flush=True)
    """
    log = tmp_path / "log"
    with open(log, "w") as file:
        processes = [subprocess.Popen([sys.executable, "-c", code], stdout=file) for _ in range(2)]
        assert [process.wait() for process in processes] == [0, 0]
    lines = [line for line in log.read_text().split("\n") if not line.startswith("Waiting")]
    assert lines == ["in", "out", "in", "out", ""]


def replace_child(monkeypatch, code: str) -> None:
    """Lets the process that prepares run `code` instead."""
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, _run=subprocess.run, **options: _run(
            [sys.executable, "-c", code], **options
        ),
    )


def test_failed_preparation_shows_how_to_repeat_it_and_why(monkeypatch, tmp_path):
    replace_child(
        monkeypatch, "print('x' * 9999); print('AssertionError: get it by hand'); exit(2)"
    )
    with pytest.raises(UserError) as info:
        prepare.prepare_once("glyphs", data_dir=str(tmp_path))
    message = str(info.value)
    assert "Preparing glyphs failed (exit code 2)" in message
    assert f"python -m vitcls.data.sources.prepare glyphs --data_dir={tmp_path}" in message
    assert message.endswith("AssertionError: get it by hand")
    assert len(message) < 3000


def test_a_preparation_that_outlives_its_parent_keeps_the_lock(monkeypatch, tmp_path):
    path = tmp_path / "glyphs" / ".1.0.0.lock"
    # The child returns to its parent at once, and leaves a process that holds the lock for a while.
    child = "import os, time\nif os.fork(): os._exit(2)\nos.close(1)\ntime.sleep(1.5)"
    replace_child(monkeypatch, child)
    with pytest.raises(UserError):
        prepare.prepare_once("glyphs", data_dir=str(tmp_path))
    with open(path) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX)  # until it ends


def test_without_locks_another_process_may_be_the_first_to_prepare(monkeypatch, tmp_path):
    def refuse(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    replace_child(monkeypatch, "exit(2)")  # it finds the other's folder in its way
    with pytest.raises(UserError, match="Preparing glyphs failed"):
        prepare.prepare_once("glyphs", data_dir=str(tmp_path))
    answers = iter([False, False, True])  # at first, under the lock, after the failure
    monkeypatch.setattr(builders, "is_prepared", lambda builder: next(answers))
    monkeypatch.setattr(prepare.tfds, "builder_from_directory", lambda folder: "builder")
    assert prepare.prepare_once("glyphs", data_dir=str(tmp_path)) == "builder"


def test_full_disk_while_preparing_is_a_storage_error(monkeypatch, tmp_path):
    replace_child(monkeypatch, "print('No space left on device'); exit(74)")
    with pytest.raises(StorageError, match="No space left on device"):
        prepare.prepare_once("glyphs", data_dir=str(tmp_path))


def test_data_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot prepare glyphs in .*file/glyphs"):
        prepare.prepare_once("glyphs", data_dir=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 74),
        (ConnectionError("no route to host"), 2),
        (AssertionError("manual download required"), 2),
    ],
)
def test_exit_code_of_preparing_tells_storage_from_the_rest(monkeypatch, capsys, error, code):
    def fail(source, data_dir):
        raise error

    monkeypatch.setattr(prepare, "prepare", fail)
    monkeypatch.setattr(sys, "argv", ["prepare", "tfds:mnist"])
    assert prepare.main() == code
    assert str(error) in capsys.readouterr().out


# --- subsets --------------------------------------------------------------------------------------


def test_hold_out_divides_into_two_parts_in_the_splits_order(train):
    rest, held = sources.hold_out(train, 0.1, seed=0)
    assert (rest.name, held.name) == ("train", "holdout")
    assert len(held) == round(0.1 * len(train))
    ids = [train.id(i) for i in range(len(train))]
    rest_ids, held_ids = ([part.id(i) for i in range(len(part))] for part in (rest, held))
    assert sorted(rest_ids + held_ids) == sorted(ids)
    assert held_ids == sorted(held_ids, key=ids.index)
    assert rest_ids == sorted(rest_ids, key=ids.index)
    assert rest.class_names == held.class_names == train.class_names


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.37, 0.5, 0.9])
def test_hold_out_is_stratified_to_one_example(train, fraction):
    _, held = sources.hold_out(train, fraction, seed=1)
    counts, expected = (np.bincount(split.labels(), minlength=10) for split in (held, train))
    exact_fraction = len(held) / len(train)
    assert np.abs(counts - expected * exact_fraction).max() < 1 + 1e-9


def test_hold_out_depends_on_the_seed_only(train):
    parts = [sources.hold_out(train, 0.2, seed=seed)[1] for seed in (0, 0, 1)]
    assert parts[0].fingerprint == parts[1].fingerprint != parts[2].fingerprint


@pytest.mark.parametrize("fraction", [0, 0.001, 0.999, 1])
def test_hold_out_of_nothing_or_everything_is_refused(fraction):
    with pytest.raises(UserError, match=f"Holding out {fraction} of the 30 .* both parts need"):
        sources.hold_out(TenEach(), fraction, seed=0)


def test_take_per_class_takes_as_many_of_each(train):
    few = sources.take_per_class(train, 10, seed=0)
    assert np.bincount(few.labels()).tolist() == [10] * 10
    assert few.labels().tolist() == [few.read(i)[1] for i in range(100)]
    assert few.name == "train"


def test_take_per_class_of_more_contains_that_of_fewer(train):
    one, ten = (sources.take_per_class(train, num, seed=4) for num in (1, 10))
    ids = [{split.id(i) for i in range(len(split))} for split in (one, ten)]
    assert ids[0] < ids[1]


def test_take_per_class_depends_on_the_seed(train):
    subsets = [sources.take_per_class(train, 5, seed=seed) for seed in (0, 0, 1)]
    assert subsets[0].fingerprint == subsets[1].fingerprint != subsets[2].fingerprint


@pytest.mark.parametrize("num", [0, 11])
def test_take_per_class_of_too_many_is_refused(num):
    message = f"Cannot take {num} examples of every class .* class 'a' has 10; .* between 1 and 10"
    with pytest.raises(UserError, match=message):
        sources.take_per_class(TenEach(), num, seed=0)


class Labels(sources.Split):
    """Nothing but labels: as many of each class as asked for, mixed."""

    name, fingerprint = "train", "labels"

    def __init__(self, *counts):
        self.class_names = tuple(map(str, range(len(counts))))
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._labels = np.random.default_rng(0).permutation(labels)

    def __len__(self):
        return len(self._labels)

    def read(self, index):
        return b"", int(self._labels[index])

    def id(self, index):
        return str(index)

    def labels(self):
        return self._labels


@pytest.mark.parametrize("division", ["hash", "position"])
@pytest.mark.parametrize("counts", [(50, 50, 50), (101, 7, 13, 2), (9, 3)])
def test_folds_are_disjoint_cover_the_split_and_are_stratified(counts, division):
    split, num_folds = Labels(*counts), 5
    held = [
        sources.take_fold(split, fold, num_folds, seed=1, division=division)[1]
        for fold in range(1, 6)
    ]
    indices = [part.indices for part in held]
    np.testing.assert_array_equal(np.sort(np.concatenate(indices)), np.arange(len(split)))
    per_class = np.array([np.bincount(part.labels(), minlength=len(counts)) for part in held])
    assert np.ptp(per_class, axis=0).max() <= 1
    # How many of each class scikit-learn puts into each fold, where classes come in order.
    labels = np.sort(split.labels())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer examples than there are folds
        theirs = list(sklearn.model_selection.StratifiedKFold(num_folds).split(labels, labels))
    expected = [np.bincount(labels[test], minlength=len(counts)) for _, test in theirs]
    if division == "hash":
        # A class' folds depend on no other class, and so the larger ones are other ones.
        np.testing.assert_array_equal(np.sort(per_class, axis=0), np.sort(expected, axis=0))
    else:
        np.testing.assert_array_equal(per_class, expected)
    if division == "position" or len(set(counts)) == 1:
        assert np.ptp(per_class.sum(1)) <= 1
    for fold in range(1, 6):
        rest, part = sources.take_fold(split, fold, num_folds, seed=1, division=division)
        assert (rest.name, part.name) == ("train", "holdout")
        assert sorted([*rest.indices, *part.indices]) == list(range(len(split)))


def test_folds_depend_on_the_seed_only():
    folds = [sources.take_fold(Labels(30, 20), 2, 5, seed=seed)[1] for seed in (0, 0, 1)]
    assert folds[0].fingerprint == folds[1].fingerprint != folds[2].fingerprint


def test_more_folds_than_examples_are_refused():
    with pytest.raises(UserError, match="The 30 examples in .* cannot be divided into 31 folds"):
        sources.take_fold(TenEach(), 1, 31, seed=0)


def test_long_tails_have_the_published_sizes():
    # CIFAR-10-LT and CIFAR-100-LT of Cao et al. 2019 (arXiv:1906.07413), imbalance ratio 100.
    ten = sources.take_long_tail(Labels(*[5000] * 10), 100, seed=0)
    assert np.bincount(ten.labels()).tolist() == [
        5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50,
    ]  # fmt: skip
    assert len(sources.take_long_tail(Labels(*[500] * 100), 100, seed=0)) == 10847


def test_long_tail_of_a_larger_ratio_is_a_part_of_that_of_a_smaller():
    chosen = [
        set(sources.take_long_tail(Labels(40, 40, 40), ratio, seed=5).indices.tolist())
        for ratio in (1, 4, 40)
    ]
    assert [len(indices) for indices in chosen] == [120, 40 + 20 + 10, 40 + 6 + 1]
    assert chosen[2] < chosen[1] < chosen[0]
    other = sources.take_long_tail(Labels(40, 40, 40), 4, seed=6)
    assert set(other.indices.tolist()) != chosen[1]


def test_long_tail_keeps_its_ratio_where_classes_differ():
    tail = sources.take_long_tail(Labels(100, 10, 40), 4, seed=0)
    assert np.bincount(tail.labels()).tolist() == [20, 10, 5]


def test_long_tail_that_leaves_a_class_empty_is_refused():
    with pytest.raises(UserError, match="data.long_tail=11 leaves class 'c' of 'train' without"):
        sources.take_long_tail(TenEach(), 11, seed=0)


def test_subsets_of_subsets_read_the_right_examples():
    rest, _ = sources.hold_out(TenEach(), 0.5, seed=0)
    few = sources.take_per_class(rest, 2, seed=0)
    assert [few.read(i)[1] for i in range(6)] == few.labels().tolist()
    assert [int(few.id(i).split()[1]) % 3 for i in range(6)] == few.labels().tolist()


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_prepared_data_that_a_power_loss_has_cut_have_a_message(name, digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "tfds")
    (path,) = (tmp_path / "tfds").rglob(name)
    path.write_text("")
    message = "The prepared data of digits cannot be read .*Remove their folder"
    with pytest.raises(UserError, match=message):
        sources.open_split("digits", "train", data_dir=str(tmp_path / "tfds"))
