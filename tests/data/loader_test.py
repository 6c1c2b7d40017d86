import functools
import io
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vitcls.data import images, loader, sources
from vitcls.data.cache import cached
from vitcls.data.skipped import Skipped
from vitcls.errors import UserError

CROP = functools.partial(
    images.random_resized_crop,
    size=(8, 6),
    scale=(0.2, 1),
    ratio=(3 / 4, 4 / 3),
    resample="bicubic",
)
SQUASH = functools.partial(images.squash, size=(8, 6), resample="bicubic")


@pytest.fixture(scope="module")
def digits(digits_dir) -> sources.Split:
    return sources.open_split("digits", "test", data_dir=digits_dir)


class Greys(sources.Split):
    """Images of one grey level each, the example's index; some files and labels may be wrong."""

    name, class_names, fingerprint = "train", ("a", "b", "c"), "greys"

    def __init__(self, num_examples, *, files=None, labels=None):
        self._num_examples = num_examples
        self._files = files or {}
        self._labels = labels or {}

    def __len__(self):
        return self._num_examples

    def read(self, index):
        file = io.BytesIO()
        Image.new("L", (5, 4), index).save(file, "PNG")
        return self._files.get(index, file.getvalue()), self._labels.get(index, index % 3)

    def id(self, index):
        return f"grey_{index}"

    def labels(self):
        return np.arange(self._num_examples, dtype=np.int32) % 3


def train(split, **options):
    defaults = {
        "global_batch_size": 12,
        "start_step": 0,
        "total_steps": 5,
        "seed": 0,
        "transform": CROP,
        "num_threads": 2,
    }
    return list(loader.train_batches(split, **defaults | options))


def evaluate(split, **options):
    defaults = {"global_batch_size": 12, "transform": SQUASH, "num_threads": 2}
    return loader.eval_batches(split, **defaults | options)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def join(per_process):
    """Global batches from the local ones of each process."""
    return [
        {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for batches in zip(*per_process, strict=True)
    ]


# --- training -------------------------------------------------------------------------------------


def test_train_batches_have_the_documented_form(digits):
    (batch,) = train(digits, total_steps=1)
    forms = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert forms == {
        "image": ((12, 8, 6, 3), np.uint8),
        "targets": ((12, 10), np.float32),
        "mask": ((12,), np.float32),
        "index": ((12,), np.int32),
    }
    assert batch["mask"].all()
    labels = digits.labels()[batch["index"]]
    np.testing.assert_array_equal(batch["targets"], np.eye(10)[labels])


def test_images_of_a_batch_are_those_of_its_examples():
    for batch in train(Greys(100)):
        greys = np.broadcast_to(batch["index"][:, None, None, None], batch["image"].shape)
        np.testing.assert_array_equal(batch["image"], greys)


@pytest.mark.parametrize("num_examples", [5, 12, 17])
def test_every_epoch_shows_every_example_once(num_examples):
    batches = train(Greys(num_examples), total_steps=num_examples)  # 12 epochs
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(12, num_examples)
    assert (np.sort(epochs) == np.arange(num_examples)).all()


def test_the_same_example_is_cropped_anew_every_time(digits):
    one = sources.Subset("one", digits, indices=np.array([0]))
    (batch,) = train(one, total_steps=1)
    crops = batch["image"].reshape(12, -1)
    assert len(np.unique(crops, axis=0)) == 12


def test_seed_changes_order_and_crops(digits):
    first, second = (train(digits, seed=seed)[0] for seed in (0, 1))
    assert (first["index"] != second["index"]).any()
    one = sources.Subset("one", digits, indices=np.array([0]))
    first, second = (train(one, seed=seed)[0] for seed in (0, 1))
    assert (first["image"] != second["image"]).any()


@pytest.mark.parametrize("num_threads", [0, 1, 7])
def test_train_batches_do_not_depend_on_threads(digits, num_threads):
    assert_same(train(digits, num_threads=num_threads), train(digits))


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_train_batches_do_not_depend_on_processes(digits, process_count):
    parts = [
        train(digits, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    assert_same(join(parts), train(digits))


@pytest.mark.parametrize("start_step", [1, 4, 5])
def test_continuing_gives_the_batches_that_remain(digits, start_step):
    assert_same(train(digits, start_step=start_step), train(digits)[start_step:])


def test_a_late_start_takes_no_longer():
    started = time.monotonic()
    start = 10**9
    train(Greys(100), start_step=start, total_steps=start + 1)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_ids_of_a_step_are_those_of_the_images_that_it_shows(sampling):
    shown = train(Greys(20), total_steps=4, sampling=sampling)
    for step in (1, 4):
        ids = loader.train_ids(Greys(20), step, global_batch_size=12, seed=0, sampling=sampling)
        assert ids == [f"grey_{index}" for index in shown[step - 1]["index"]]


def test_batches_that_processes_cannot_share_are_refused(digits):
    with pytest.raises(UserError, match="12 images is not divisible by 5 processes"):
        train(digits, process_count=5)
    with pytest.raises(UserError, match="12 images is not divisible by 5 processes"):
        evaluate(digits, process_count=5)


@pytest.mark.parametrize("sampling", ["sqrt", "balanced"])
def test_drawn_batches_do_not_depend_on_processes_or_where_they_start(sampling):
    split = sources.Subset("few", Greys(60), indices=np.array([0, 1, *range(2, 60, 3)]))
    whole = train(split, sampling=sampling)
    parts = [train(split, sampling=sampling, process_index=i, process_count=3) for i in range(3)]
    assert_same(join(parts), whole)
    assert_same(train(split, sampling=sampling, start_step=3), whole[3:])
    counts = sum(batch["targets"].sum(0) for batch in train(split, sampling=sampling))
    assert counts[0] + counts[1] > 12  # of 60; 5 on average, were all examples equal


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("num_examples", [1, 11, 12, 25, 36])
def test_evaluation_counts_every_example_once(num_examples, process_count):
    split = Greys(num_examples)
    parts = [
        evaluate(split, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = join(parts)
    assert len(batches) == len(parts[0]) == -(-num_examples // 12)
    mask, index = (np.concatenate([batch[name] for batch in batches]) for name in ("mask", "index"))
    assert index[mask == 1].tolist() == list(range(num_examples))
    assert (index[mask == 0] == -1).all()


def test_rows_that_fill_up_are_black_and_without_target():
    *_, last = evaluate(Greys(14))
    assert last["mask"].tolist() == [1, 1] + [0] * 10
    assert not last["image"][2:].any()
    assert not last["targets"][2:].any()
    assert last["image"].shape == (12, 8, 6, 3)


def test_evaluation_shows_the_transformed_images_in_order(digits):
    batches = list(evaluate(digits))
    expected = [SQUASH(images.decode(digits.read(i)[0])) for i in range(len(digits))]
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in batches]), expected)
    targets = np.concatenate([b["targets"] for b in batches])
    np.testing.assert_array_equal(targets.argmax(axis=1), digits.labels())


def test_evaluation_can_be_repeated(digits):
    batches = evaluate(digits)
    assert_same(list(batches), list(batches))


# --- what cannot be used --------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [0, 2])
def test_corrupt_images_are_named(num_threads):
    split = Greys(40, files={30: b"not an image"})
    message = "Example grey_30 of split 'train' cannot be used: Not a readable .* take it out of"
    with pytest.raises(UserError, match=message):
        list(evaluate(split, num_threads=num_threads))
    with pytest.raises(UserError, match=message):
        train(split, num_threads=num_threads)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_class_are_named(label):
    message = f"Example grey_5 of split 'train' has label {label}, not one of the 3 classes 0..2"
    with pytest.raises(UserError, match=message):
        list(evaluate(Greys(6, labels={5: label})))


@pytest.mark.parametrize("where", ["", "ram", "disk"])
def test_twelve_bits_in_sixteen_are_named_once_for_a_split(caplog, tmp_path, where):
    file = io.BytesIO()
    Image.fromarray(np.full((5, 4), 4095, np.uint16)).save(file, "PNG")
    split = cached(
        Greys(24, files={7: file.getvalue(), 19: file.getvalue()}),
        str(tmp_path) if where == "disk" else where,
    )
    split.fill_cache(num_threads=1)
    batches = evaluate(split)
    for _ in range(2):
        assert all(batch["mask"].all() and "dim" not in batch for batch in batches)
    train(split)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Split 'train': grey_")
    assert "is nearly black: it is 16-bit grey" in message
    assert message.endswith("vitcls.check_data counts all such images.")


def test_batches_before_a_corrupt_image_still_come():
    batches = iter(evaluate(Greys(40, files={30: b""})))
    assert [next(batches)["index"][0] for _ in range(2)] == [0, 12]
    with pytest.raises(UserError, match="grey_30"):
        next(batches)


# --- skipping what cannot be used -----------------------------------------------------------------

BAD = {3: b"", 30: b"not an image"}


@pytest.fixture
def skipped(tmp_path) -> Skipped:
    return Skipped(tmp_path / "skipped.jsonl")


def assert_same_but_for(batches, expected, bad):
    """Rows of the bad examples are black and have mask 0; all others are the same."""
    num_bad = 0
    for batch, other in zip(batches, expected, strict=True):
        is_bad = np.isin(batch["index"], bad)
        num_bad += is_bad.sum()
        np.testing.assert_array_equal(batch["index"], other["index"])
        for name in ("image", "targets", "mask"):
            assert not batch[name][is_bad].any()
            np.testing.assert_array_equal(batch[name][~is_bad], other[name][~is_bad])
    assert num_bad


@pytest.mark.parametrize("num_threads", [0, 3])
def test_skipping_changes_no_other_row(skipped, num_threads):
    good, bad = Greys(40), Greys(40, files=BAD)
    options = dict(num_threads=num_threads, total_steps=10)
    assert_same_but_for(train(bad, skipped=skipped, **options), train(good, **options), list(BAD))
    batches = list(evaluate(bad, skipped=skipped, num_threads=num_threads))
    assert_same_but_for(batches, list(evaluate(good)), list(BAD))


def test_wrong_labels_are_never_skipped(skipped):
    with pytest.raises(UserError, match="grey_5 of split 'train' has label 9"):
        list(evaluate(Greys(40, files=BAD, labels={5: 9}), skipped=skipped))


def test_training_on_mostly_bad_images_stops_before_the_end_of_an_epoch(skipped):
    class Bad(Greys):
        def read(self, index):
            return b"", 0

    batches = loader.train_batches(
        Bad(10**5), global_batch_size=500, start_step=0, total_steps=100, seed=0, transform=CROP,
        num_threads=1, skipped=skipped,
    )  # fmt: skip
    with pytest.raises(UserError, match="More than half of the 100000 images in 'train' cannot"):
        list(batches)
    assert skipped.count("train") == 1000


# --- worker processes -----------------------------------------------------------------------------

# A run of its own, as Grain's workers import the main module of whoever starts them. After the
# first batch it sends itself and its workers the signal that a cluster sends before it kills.
_SCRIPT = """
import functools, itertools, multiprocessing, os, signal, sys, time
from vitcls.data import images, loader, sources

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    batches = loader.train_batches(
        sources.open_split("digits", "test", data_dir=sys.argv[1]),
        global_batch_size=12, start_step=0, total_steps=1000, seed=0, num_threads=1, num_workers=2,
        transform=functools.partial(
            images.random_resized_crop, size=(8, 6), scale=(0.2, 1), ratio=(3 / 4, 4 / 3),
            resample="bicubic",
        ),
    )
    first = next(batches)
    os.killpg(0, signal.SIGTERM)
    indices = [batch["index"].tolist() for batch in (first, *itertools.islice(batches, 4))]
    sums = [int(batch["image"].sum()) for batch in itertools.islice(batches, 5)]
    print(indices, sums, [child.pid for child in multiprocessing.active_children()], sep="\\n")
    sys.stdout.flush()
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_workers_give_the_same_batches_outlast_a_signal_and_end_with_their_parent(
    digits, digits_dir, tmp_path
):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(loader.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script), digits_dir],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    )
    try:
        indices, sums, workers = (json.loads(process.stdout.readline()) for _ in range(3))
    finally:
        process.kill()
        process.wait()
    expected = train(digits, total_steps=10)
    assert indices == [batch["index"].tolist() for batch in expected[:5]]
    assert sums == [int(batch["image"].sum()) for batch in expected[5:]]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than an entry that nobody has waited for."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_when_the_iterator_is_closed(digits):
    # Grain's workers import this test's main module, pytest, which is harmless.
    batches = loader.train_batches(
        digits,
        global_batch_size=12,
        start_step=0,
        total_steps=1000,
        seed=0,
        transform=CROP,
        num_threads=1,
        num_workers=1,
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()
    assert not worker.is_alive()


# A pass that ends early, one that the process leaves open, and batches that outlive their pass.
_PASSES = """
import functools, itertools, sys
from vitcls.data import images, loader, sources

if __name__ == "__main__":
    split = sources.open_split("digits", "test", data_dir=sys.argv[1])
    options = dict(
        global_batch_size=12, num_threads=2, num_workers=2,
        transform=functools.partial(images.squash, size=(8, 6), resample="bicubic"),
    )
    kept = list(itertools.islice(loader.eval_batches(split, **options), 3))
    batches = iter(loader.eval_batches(split, **options))
    kept.append(next(batches))
    raise SystemExit(sum(int(batch["mask"].sum()) for batch in kept))
"""


def test_workers_leave_no_shared_memory_behind(digits_dir, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_PASSES)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(loader.__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, str(script), digits_dir],
        capture_output=True, env=environment, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 4 * 12, result.stderr
    assert "leaked" not in result.stderr
    assert "resource_tracker" not in result.stderr
