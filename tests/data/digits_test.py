import hashlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vitcls.data import images, sources


@pytest.fixture(scope="module")
def splits(digits_dir):
    return [sources.open_split("digits", name, data_dir=digits_dir) for name in ("train", "test")]


def read_pixels(split: sources.Split) -> np.ndarray:
    """The 17 grey levels of a split's scans, int (N, 8, 8)."""
    decoded = [np.asarray(images.decode(split.read(i)[0])) for i in range(len(split))]
    return np.round(np.stack(decoded)[..., 0] / (255 / 16)).astype(int)


def test_digits_have_ten_classes_and_the_documented_sizes(splits):
    train, test = splits
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == test.class_names == tuple("0123456789")


def test_digits_are_scikit_learns_each_once(splits):
    pixels = np.concatenate([read_pixels(split) for split in splits]).reshape(-1, 64)
    labels = np.concatenate([split.labels() for split in splits])
    digits = load_digits()
    ours = sorted(np.column_stack([pixels, labels]).tolist())
    assert ours == sorted(np.column_stack([digits.data, digits.target]).astype(int).tolist())


def test_digits_test_split_is_stratified(splits):
    counts = [np.bincount(split.labels()) for split in splits]
    share = counts[1] / (counts[0] + counts[1])
    np.testing.assert_allclose(share, 360 / 1797, atol=1 / 174)  # one example of the rarest class


def test_digits_test_split_never_changes(splits):
    test = splits[1]
    scans = sorted(zip(read_pixels(test).reshape(-1, 64).tolist(), test.labels(), strict=True))
    content = np.array([[*pixels, label] for pixels, label in scans], np.uint8).tobytes()
    expected = "dac7b09d7003b1bd999b6d24a55fbd209ec75d5bbf170e44934aa3c274bdf7b1"
    assert hashlib.sha256(content).hexdigest() == expected


@pytest.mark.slow
def test_what_is_shipped_is_what_preparing_gives(tmp_path):
    pytest.importorskip("sklearn")
    program = (
        "from vitcls.data.digits.digits import Digits\n"
        f"Digits(data_dir={str(tmp_path)!r}).download_and_prepare(file_format='array_record')"
    )
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    if "No module named 'tensorflow'" in done.stderr:
        pytest.skip("no TensorFlow")
    assert done.returncode == 0, done.stderr
    for name in ("train", "test"):
        shipped = sources.open_split("digits", name, data_dir=str(tmp_path / "none"))
        prepared = sources.open_split("digits", name, data_dir=str(tmp_path))
        numbers = range(len(prepared))
        assert prepared.class_names == shipped.class_names
        assert prepared.fingerprint == shipped.fingerprint
        assert [prepared.id(i) for i in numbers] == [shipped.id(i) for i in numbers]
        assert [prepared.read(i) for i in numbers] == [shipped.read(i) for i in numbers]
