"""Files of the workdir: whole or absent, and clear about where they cannot be."""

import os

import numpy as np
import pytest

from vitcls.errors import UserError
from vitcls.files import make_folder
from vitcls.provenance import records
from vitcls.provenance.results import last_line

RESULTS = {
    "seconds": 61.4,
    "splits": {
        "test": {"accuracy": 0.98061, "num_examples": 360},
        "holdout": {"accuracy": 0.9, "num_examples": 144},
    },
}


def test_last_line_names_the_evaluated_splits_only():
    line = last_line(RESULTS, "runs/quickstart", splits=("test",))
    assert line == "test accuracy 0.9806 (360 images) in 61 s -> runs/quickstart"


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made"):
        make_folder(tmp_path / "file" / "below")


def test_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written to"):
        make_folder(tmp_path)


def test_predictions_come_back(tmp_path):
    records.save_predictions(
        tmp_path / "predictions/test.npz",
        labels=np.array([1, 0], np.int32),
        logits=np.eye(2, dtype=np.float32),
        ids=["a", "bcd"],
    )
    loaded = np.load(tmp_path / "predictions/test.npz")
    assert loaded["ids"].tolist() == ["a", "bcd"]
    np.testing.assert_array_equal(loaded["logits"], np.eye(2))
    assert os.listdir(tmp_path / "predictions") == ["test.npz"]
