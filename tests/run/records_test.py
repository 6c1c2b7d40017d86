"""Files of the workdir: whole or absent, and clear about where they cannot be."""

import json
import os

import jax
import numpy as np
import pytest

from vitcls.errors import UserError
from vitcls.files import make_folder, write_json
from vitcls.run import records
from vitcls.step import sharding

RESULTS = {
    "seconds": 61.4,
    "splits": {
        "test": {"accuracy": 0.98061, "num_examples": 360},
        "holdout": {"accuracy": 0.9, "num_examples": 144},
    },
}


def test_last_line_names_the_evaluated_splits_only():
    line = records.last_line(RESULTS, "runs/quickstart", splits=("test",))
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


def test_continuations_are_added_to_the_manifest(tmp_path):
    mesh = sharding.make_mesh(-1, 1)
    path = tmp_path / "manifest.json"
    write_json(path, records.manifest(mesh, [], None))
    for step in (10, 20):
        records.note_continuation(path, mesh, [], source="", step=step)
    continued = json.loads(path.read_text())["continued"]
    assert [entry["step"] for entry in continued] == [10, 20]
    assert continued[0]["devices"]["count"] == 8


@pytest.mark.parametrize("left", [None, "", '{"command": ["py'])
def test_a_manifest_that_is_lost_or_cut_is_made_again(left, tmp_path):
    path = tmp_path / "manifest.json"
    if left is not None:
        path.write_text(left)
    mesh = sharding.make_mesh(-1, 1)
    records.note_continuation(path, mesh, [], source="google/vit", step=10)
    content = json.loads(path.read_text())
    assert content["rebuilt"] and content["pretrained"]["source"] == "google/vit"
    assert [entry["step"] for entry in content["continued"]] == [10]


def test_a_continuation_with_other_settings_of_jax_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(records.log, "propagate", True)
    path, mesh = tmp_path / "manifest.json", sharding.make_mesh(-1, 1)
    write_json(path, records.manifest(mesh, [], None))
    records.note_continuation(path, mesh, [], source="", step=1)
    assert not caplog.text
    with jax.default_matmul_precision("highest"):
        records.note_continuation(path, mesh, [], source="", step=2)
    assert "JAX_DEFAULT_MATMUL_PRECISION=highest, and None when this run began" in caplog.text
