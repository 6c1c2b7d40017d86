"""Cached batches are those without a cache, and a cache on disk survives whatever happens to it."""

import concurrent.futures
import errno
import fcntl
import functools
import io
import math
import os
import pathlib
import pickle
import resource
import shutil
import signal
import threading
import time
import types

import numpy as np
import PIL
import pytest
from PIL import Image

from tests.data.loader_test import assert_same
from vitcls.config.fields import default_config
from vitcls.data import cache, images, loader, sources
from vitcls.data.cache import cached
from vitcls.data.skipped import Skipped
from vitcls.errors import StorageError, UserError
from vitcls.folders import lock
from vitcls.run import splits

CROP = functools.partial(
    images.random_resized_crop,
    size=(8, 6), scale=(0.2, 1), ratio=(3 / 4, 4 / 3), resample="bicubic",
)  # fmt: skip
SQUASH = functools.partial(images.squash, size=(8, 6), resample="bicubic")
NUM_IMAGES = 40  # three shards: 16, 16 and 8


class Noise(sources.Split):
    """Noise of many sizes, upright and not, with transparency and without."""

    name, class_names, fingerprint = "train", ("a", "b"), "noise"

    def __init__(self, num_images=NUM_IMAGES, *, bad=()):
        self._num_images, self._bad = num_images, bad

    def __len__(self):
        return self._num_images

    def read(self, index):
        if index in self._bad:
            return b"not an image", index % 2
        height, width = 9 + index % 50, 60 - index % 50
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 4), np.uint8)
        image, file = Image.fromarray(pixels), io.BytesIO()
        if index % 2:
            exif = Image.Exif()
            exif[0x0112] = 6  # lies on its side
            image.convert("RGB").save(file, "JPEG", exif=exif)
        else:
            image.save(file, "PNG")  # with transparency
        return file.getvalue(), index % 2

    def id(self, index):
        return f"noise_{index}"

    def labels(self):
        return np.arange(self._num_images, dtype=np.int32) % 2


@pytest.fixture
def decoded(monkeypatch) -> list[bytes]:
    """The files that have been decoded."""
    files, decode = [], images.decode

    def decode_and_record(data):
        files.append(data)
        return decode(data)

    monkeypatch.setattr(images, "decode", decode_and_record)
    return files


@pytest.fixture(params=["ram", "folder"])
def where(request, tmp_path) -> str:
    return "ram" if request.param == "ram" else str(tmp_path)


def fill(split: sources.Split, where, *, num_threads=3) -> sources.Split:
    split = cached(split, str(where))
    split.fill_cache(num_threads=num_threads)
    return split


def shards(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("vitcls-cache/*/*.rgb"))


def files(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.glob("vitcls-cache/*/*")}


def train(split, **options):
    defaults = dict(global_batch_size=12, start_step=0, total_steps=9, seed=0, num_threads=3)
    return list(loader.train_batches(split, transform=CROP, **defaults | options))


def evaluate(split, **options):
    defaults = dict(global_batch_size=12, num_threads=3)
    return list(loader.eval_batches(split, transform=SQUASH, **defaults | options))


# --- the same batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [0, 3])
def test_batches_are_those_without_a_cache(where, num_threads):
    split = fill(Noise(), where)
    for _ in range(2):
        assert_same(train(split, num_threads=num_threads), train(Noise()))
        assert_same(evaluate(split, num_threads=num_threads), evaluate(Noise()))


def test_subsets_have_the_same_batches_and_fingerprints(where):
    plain, split = Noise(), cached(Noise(), where)
    for part in (
        lambda whole: sources.hold_out(whole, 0.3, seed=5)[0],
        lambda whole: sources.hold_out(whole, 0.3, seed=5)[1],
        lambda whole: sources.take_per_class(sources.hold_out(whole, 0.3, seed=5)[0], 7, seed=5),
    ):
        part(split).fill_cache(num_threads=1)
        assert_same(train(part(split)), train(part(plain)))
        assert_same(evaluate(part(split)), evaluate(part(plain)))
        assert part(split).fingerprint == part(plain).fingerprint


def test_worker_processes_have_the_same_batches(tmp_path):
    split = fill(Noise(), tmp_path)
    assert_same(train(split, num_workers=1, num_threads=1), train(Noise()))


def test_a_pickled_cache_gives_the_same_batches(where):
    split = fill(Noise(), where)
    evaluate(split)
    assert_same(evaluate(pickle.loads(pickle.dumps(split))), evaluate(Noise()))


def test_processes_get_no_copy_of_the_images(tmp_path):
    split = fill(Noise(200), tmp_path)
    evaluate(split)
    assert len(pickle.dumps(split)) < 2000


def test_threads_that_meet_in_memory_see_the_same_pixels():
    split, barrier = cached(Noise(8), "ram"), threading.Barrier(4)

    def read_all(_):
        barrier.wait()
        return [np.asarray(split.image(index)[0]) for index in range(8)]

    expected = [np.asarray(Noise().image(index)[0]) for index in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(read_all, range(4)):
            for one, other in zip(pixels, expected, strict=True):
                np.testing.assert_array_equal(one, other)


# --- decoded once ---------------------------------------------------------------------------------


def test_memory_is_filled_on_first_use(decoded):
    split = cached(Noise(), "ram")
    split.fill_cache(num_threads=3)
    assert not decoded
    first = evaluate(split)
    assert len(decoded) == NUM_IMAGES
    assert_same(evaluate(split), first)
    assert len(decoded) == NUM_IMAGES


def test_other_runs_with_whatever_seed_decode_nothing(tmp_path, decoded):
    fill(sources.hold_out(cached(Noise(), str(tmp_path)), 0.2, seed=0)[0], "")
    assert len(decoded) == NUM_IMAGES
    rest, held = sources.hold_out(cached(Noise(), str(tmp_path)), 0.2, seed=1)
    for split in (rest, held):
        split.fill_cache(num_threads=2)
        evaluate(split)
    assert len(decoded) == NUM_IMAGES


def test_a_cache_takes_no_more_than_the_pixels(tmp_path):
    fill(Noise(), tmp_path)
    pixels = sum(np.asarray(Noise().image(index)[0]).nbytes for index in range(NUM_IMAGES))
    assert sum(path.stat().st_size for path in shards(tmp_path)) == pixels + 32 * NUM_IMAGES


def test_a_large_split_has_few_files(tmp_path):
    file = Noise().read(0)

    class Same(Noise):
        def read(self, index):
            return file

    fill(Same(5000), tmp_path)
    assert len(shards(tmp_path)) == 64  # of at most 79 images


def test_other_images_with_the_same_names_and_sizes_have_another_cache(tmp_path):
    levels = {}
    for root, level in [("one", 50), ("other", 200)]:
        for name in ("a", "b"):
            folder = tmp_path / root / "train" / name
            folder.mkdir(parents=True)
            Image.new("RGB", (5, 4), (level, 0, 0)).save(folder / "1.bmp")
        split = fill(sources.open_split(f"folder:{tmp_path / root}", "train"), tmp_path)
        levels[root] = (split.fingerprint, split.image(0)[0].getpixel((0, 0))[0])
    assert levels["one"][0] == levels["other"][0]
    assert (levels["one"][1], levels["other"][1]) == (50, 200)


def test_another_version_of_the_decoder_has_another_cache(tmp_path, monkeypatch, decoded):
    fill(Noise(), tmp_path)
    monkeypatch.setattr(PIL, "__version__", "1.0")
    fill(Noise(), tmp_path)
    assert len(decoded) == 2 * NUM_IMAGES


# --- interrupted, damaged -------------------------------------------------------------------------


def test_ctrl_c_ends_filling_and_the_next_run_goes_on(tmp_path, monkeypatch, decoded):
    record = images.decode

    def decode_until_interrupted(data):
        if len(decoded) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return record(data)

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", decode_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill(Noise(200), tmp_path, num_threads=1)
    assert len(decoded) < 30
    assert files(tmp_path) == {"lock", *(f"{i:03}.rgb" for i in range(len(shards(tmp_path))))}
    left = 200 - 16 * len(shards(tmp_path))
    assert left < 200
    decoded.clear()
    assert_same(evaluate(fill(Noise(200), tmp_path)), evaluate(Noise(200)))
    assert len(decoded) == left + 200  # of them those that are compared with


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    fill(Noise(), tmp_path)
    shard = shards(tmp_path)[0]
    (shard.parent / "unfinished-x").mkdir()
    shard.rename(shard.parent / "unfinished-x" / shard.name)
    fill(Noise(), tmp_path)
    assert files(tmp_path) == {"lock", "000.rgb", "001.rgb", "002.rgb"}


def test_two_runs_at_once_decode_once(tmp_path, decoded, caplog):
    caplog.set_level("INFO", "vitcls")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: fill(Noise(), tmp_path), range(2)))
    assert len(decoded) == NUM_IMAGES
    assert caplog.text.count("Decoding images of split 'train' into") == 1


def test_a_file_system_without_locks_has_a_cache_too(tmp_path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "_WARNED", set())
    fill(Noise(), tmp_path)
    unfinished = shards(tmp_path)[0].parent / "unfinished-by-another-process"
    unfinished.mkdir()
    shards(tmp_path)[0].unlink()
    split = fill(Noise(), tmp_path)
    assert unfinished.exists()
    assert_same(evaluate(split), evaluate(Noise()))
    assert caplog.text.count("without locks (No locks available)") == 1


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "cut to rows", "longer"])
def test_a_damaged_file_is_written_again(tmp_path, decoded, damage):
    fill(Noise(), tmp_path)
    before = {path: path.stat().st_ino for path in shards(tmp_path)}
    shard = shards(tmp_path)[1]
    content = shard.read_bytes()
    shard.unlink()
    if damage != "gone":
        damaged = {"empty": b"", "cut": content[:-1], "cut to rows": content[-32 * 16 :]}
        shard.write_bytes(damaged.get(damage, content + b"0"))
    decoded.clear()
    split = fill(Noise(), tmp_path)
    assert len(decoded) == 16
    assert shard.read_bytes() == content
    assert all(path.stat().st_ino == before[path] for path in before if path != shard)
    assert_same(evaluate(split), evaluate(Noise()))


def test_a_file_that_disappears_during_a_run_is_named(tmp_path):
    split = fill(Noise(), tmp_path)
    split = pickle.loads(pickle.dumps(split))  # as in a worker process, which has mapped nothing
    shutil.rmtree(tmp_path / "vitcls-cache")
    with pytest.raises(StorageError, match=r"cannot read .*/000.rgb, which was there at the start"):
        split.image(0)


# --- images that cannot be decoded ----------------------------------------------------------------

BAD = (2, 15, 39)


@pytest.mark.parametrize("make_batches", [train, evaluate])
def test_a_bad_image_stops_a_run_where_it_stops_without_a_cache(where, make_batches):
    messages = []
    for split in (Noise(bad=BAD), fill(Noise(bad=BAD), where)):
        with pytest.raises(UserError, match="Example noise_.* cannot be used: Not a") as error:
            make_batches(split)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("make_batches", [train, evaluate])
def test_bad_images_are_skipped_as_without_a_cache(where, tmp_path, make_batches):
    plain, cached_split = Noise(bad=BAD), fill(Noise(bad=BAD), where)
    lists = [Skipped(tmp_path / name) for name in ("plain.jsonl", "cached.jsonl")]
    expected = make_batches(plain, skipped=lists[0])
    assert_same(make_batches(cached_split, skipped=lists[1]), expected)
    assert lists[0].count("train") == lists[1].count("train") == len(BAD)
    assert (tmp_path / "plain.jsonl").read_text() == (tmp_path / "cached.jsonl").read_text()


def test_a_cache_of_bad_images_only_is_one(tmp_path):
    split = fill(Noise(bad=range(NUM_IMAGES)), tmp_path)
    with pytest.raises(images.ImageError, match="Not a readable image"):
        split.image(39)


# --- no room --------------------------------------------------------------------------------------


@pytest.fixture
def largest_file():
    """Sets the size beyond which the system refuses to let a file grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_becomes_full_ends_the_run_and_keeps_what_is_complete(
    tmp_path, decoded, largest_file
):
    fill(Noise(), tmp_path)
    sizes = [path.stat().st_size for path in shards(tmp_path)]
    assert sizes[0] < sizes[1]
    shutil.rmtree(tmp_path / "vitcls-cache")
    split = cached(Noise(), str(tmp_path))
    largest_file((sizes[0] + sizes[1]) // 2)
    with pytest.raises(StorageError, match="cannot write .*: File too large. Make room") as error:
        split.fill_cache(num_threads=1)
    assert error.value.exit_code == 74
    assert files(tmp_path) == {"lock", "000.rgb"}
    largest_file()
    decoded.clear()
    split.fill_cache(num_threads=1)
    assert len(decoded) == NUM_IMAGES - 16


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch, decoded):
    usage = types.SimpleNamespace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"images of split 'train' need about 0.0 GB more in .*, where 0.0 GB are free; make"
    with pytest.raises(StorageError, match=message):
        fill(Noise(), tmp_path)
    assert not decoded and not shards(tmp_path)


def test_the_estimate_of_what_is_needed_is_near_the_truth(tmp_path):
    _, mean = cache.sample(Noise(200))
    fill(Noise(200), tmp_path)
    size = sum(path.stat().st_size for path in shards(tmp_path)) - 32 * 200
    assert mean * 200 == pytest.approx(size, rel=0.15)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "vitcls-cache").write_text("")
    with pytest.raises(StorageError, match="cannot write .*/vitcls-cache/.*: Not a directory"):
        fill(Noise(), tmp_path)


def test_memory_that_is_scarce_is_left_alone(monkeypatch, caplog, decoded):
    monkeypatch.setattr(cache, "available_memory", lambda: 2**30 + 1000)
    split = cached(Noise(), "ram")
    for _ in range(2):
        assert_same(evaluate(split), evaluate(Noise()))
    assert len(decoded) == 4 * NUM_IMAGES
    assert caplog.text.count("40 images of split 'train' need about") == 1
    assert "0 are kept, the others are decoded every time. Set data.cache to a folder" in (
        caplog.text
    )


def test_memory_that_becomes_scarce_keeps_what_is_in_it(monkeypatch, decoded):
    answers = iter([math.inf] * 10)
    monkeypatch.setattr(cache, "available_memory", lambda: next(answers, 0))
    split = cached(Noise(), "ram")
    evaluate(split)
    decoded.clear()
    evaluate(split)
    assert len(decoded) == NUM_IMAGES - 10


# --- runs -----------------------------------------------------------------------------------------


def test_what_a_run_opens_is_cached_and_still_the_same(digits_dir, tmp_path, decoded):
    """Few images per class are not worth decoding the whole split."""
    config = default_config()
    config.data.update(source="digits", data_dir=digits_dir)
    for per_class, num_decoded in [(0, 1437 + 360), (3, 30 + 144)]:
        config.data.update(per_class=per_class, cache="")
        plain, plain_evaluated = splits.open_splits(config)
        config.data.cache = str(tmp_path)
        split, evaluated = splits.open_splits(config)
        assert split.fingerprint == plain.fingerprint
        assert evaluated.keys() == plain_evaluated.keys() == {"holdout", "test"}
        decoded.clear()
        for one in (split, *evaluated.values()):
            one.fill_cache(num_threads=2)
        assert len(decoded) == num_decoded
        for one in (split, *evaluated.values()):
            np.testing.assert_array_equal([one.image(i)[1] for i in range(len(one))], one.labels())
        assert len(decoded) == num_decoded
