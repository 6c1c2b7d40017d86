"""A finished run gets its decision afterwards, by the score that suits unknown images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vitcls.analysis import deciding
from vitcls.decision import kept
from vitcls.errors import UserError
from vitcls.predict.rows import write_rows


@pytest.fixture
def finished(tmp_path):
    """A workdir with predictions for a hold-out of 120 images, one of them wrong."""
    run = tmp_path / "run"
    for name in ("model", "predictions"):
        (run / name).mkdir(parents=True)
    (run / "results.json").write_text(json.dumps({"step": 9, "selected_step": 6, "splits": {}}))
    config = {"eval": {"select_split": "holdout", "tta": "none"}}
    (run / "config.json").write_text(json.dumps(config))
    labels = np.arange(120) % 3
    logits = (np.eye(3)[labels] * np.linspace(1, 9, 120)[:, None]).astype(np.float32)
    labels[0] = 1
    np.savez(run / "predictions/holdout.npz", labels=labels, logits=logits, ids=labels.astype(str))
    return run


def run_with(*directories, unknown="", **targets) -> list[str]:
    targets = {f"target_{name}": value for name, value in targets.items()}
    return list(deciding.decide(list(map(str, directories)), targets=targets, unknown=str(unknown)))


def test_the_file_is_that_of_a_run_with_a_target(finished):
    lines = run_with(finished, precision=0.95)
    path = finished / "model/decision.json"
    content = json.loads(path.read_text())
    assert (content["step"], content["split"], content["tta"]) == (6, "holdout", "none")
    assert content["target_precision"] == 0.95 and content["score"] == "probability"
    assert lines == [f"{kept.describe(content)} -> {path}"]
    run_with(finished, coverage=0.5)
    assert json.loads(path.read_text())["coverage"]["value"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("better", ["energy", "probability"])
def test_the_score_that_tells_unknown_images_apart_is_kept(finished, tmp_path, better):
    # Small logits far apart have a low energy, large ones that are equal a low probability.
    far, equal = np.float32([0.5, -9, -9]), np.float32([7, 7, 7])
    rows = [
        {"image": f"{i}.png", "logits": far if better == "energy" else equal, "predictions": []}
        for i in range(20)
    ]
    path = tmp_path / "unknown.npz"
    write_rows(rows, str(path), top_k=1, num_rows=20)
    run_with(finished, coverage=0.9, unknown=path)
    content = json.loads((finished / "model/decision.json").read_text())
    assert content["score"] == better
    areas = content["unknown"]["auroc"]
    assert areas[better] == max(areas.values()) > min(areas.values())
    assert content["unknown"]["num_images"] == 20
    assert content["unknown"]["rejected"]["value"] == 1
    assert kept.find(finished / "model") == content


def test_mistakes_have_their_messages(finished, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "vitcls.analysis.decide", str(finished), "--target_precision=1"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "Give exactly one of --target_precision and --target_coverage, above 0" in result.stderr
    with pytest.raises(UserError, match=r"results.json cannot be read .*: name the workdir of a f"):
        run_with(tmp_path, precision=0.9)
    (finished / "config.json").write_text('{"eval": {"select_split": ""}}')
    with pytest.raises(UserError, match=r"has no hold-out: its eval.select_split is empty.*train"):
        run_with(finished, precision=0.9)
    (finished / "results.json").write_text("{}")
    with pytest.raises(UserError, match="is not the workdir of a finished run: name the workdir"):
        run_with(finished, precision=0.9)
    assert not (finished / "model/decision.json").exists()


def test_unknown_images_that_do_not_fit_are_refused(finished, tmp_path):
    path = tmp_path / "unknown.npz"
    for logits, message in [
        (np.zeros((4, 5)), "has the logits of 5 classes, and the run has 3; make it with vitcls"),
        (np.zeros(4), r"must have finite logits \(N, K\), one image or more; make it with"),
        (np.full((4, 3), np.nan), "must have finite logits"),
    ]:
        np.savez(path, logits=logits)
        with pytest.raises(UserError, match=message):
            run_with(finished, precision=0.9, unknown=path)
    path.write_text("image,label")
    with pytest.raises(UserError, match="has no logits that can be read"):
        run_with(finished, precision=0.9, unknown=path)
    with pytest.raises(UserError, match="gone.npz does not exist"):
        run_with(finished, precision=0.9, unknown=tmp_path / "gone.npz")
    assert not (finished / "model/decision.json").exists()
