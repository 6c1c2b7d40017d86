import hashlib

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
