"""The rule is kept with the weights that it was chosen for, and says what it promises."""

import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest

from vitcls.config.fields import default_config
from vitcls.decision import kept
from vitcls.decision.rule import Rule
from vitcls.errors import UserError
from vitcls.folders.workdir import Workdir


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    caplog.set_level(logging.INFO, "vitcls")
    return caplog


def ended_run(path, *, num: int = 200, num_wrong: int = 4) -> Workdir:
    """A workdir whose least certain answers are wrong."""
    workdir = Workdir(path)
    workdir.model.mkdir(parents=True)
    workdir.predictions.mkdir()
    labels = np.arange(num) % 3
    logits = (np.eye(3)[labels] * np.linspace(1, 9, num)[:, None]).astype(np.float32)
    labels[:num_wrong] = (labels[:num_wrong] + 1) % 3
    np.savez(workdir.predictions / "holdout.npz", labels=labels, logits=logits, ids=labels)
    return workdir


def config_with(**targets):
    config = default_config()
    config.eval.update(targets)
    return config


def test_a_run_with_a_target_keeps_what_it_promises(tmp_path, log):
    workdir = ended_run(tmp_path)
    kept.write_at_end(workdir, config_with(target_precision=0.97), {"selected_step": 40})
    content = json.loads(workdir.decision.read_text())
    assert {name: content[name] for name in ("step", "split", "tta", "target_precision")} == {
        "step": 40, "split": "holdout", "tta": "none", "target_precision": 0.97,
    }  # fmt: skip
    assert content["score"] == "probability" and 0 < content["threshold"] < 1
    assert content["num_images"] == 200 and content["precision"]["value"] > 0.97
    coverage = content["coverage"]
    assert coverage["low"] < coverage["value"] == content["num_answered"] / 200 <= coverage["high"]
    assert re.search(
        r"With --reject \d+\.\d % \(95 % interval .*\) of images are answered, ", log.text
    )
    assert kept.find(workdir.model) == content
    # A later end of the run without a target leaves no rule for other weights.
    kept.write_at_end(workdir, default_config(), {"selected_step": 80})
    assert kept.find(workdir.model) is None


def test_a_target_out_of_reach_rejects_all_and_names_one_in_reach(tmp_path, log):
    workdir = ended_run(tmp_path)
    kept.write_at_end(workdir, config_with(target_precision=0.999), {"selected_step": 40})
    content = json.loads(workdir.decision.read_text())
    assert content["threshold"] is None and content["num_answered"] == 0
    assert "No threshold promises a precision of 0.999 on the 200 images of holdout" in log.text
    highest = float(re.search(r"--target_precision=(0\.\d+)", log.text).group(1))
    kept.write_at_end(workdir, config_with(target_precision=highest), {"selected_step": 40})
    assert json.loads(workdir.decision.read_text())["threshold"] is not None
    assert "too few" not in log.text


def test_few_images_are_warned_of(tmp_path, log):
    workdir = ended_run(tmp_path, num=29, num_wrong=0)
    kept.write_at_end(workdir, config_with(target_coverage=0.9), {"selected_step": 40})
    assert "holdout has 29 images, too few to choose a threshold by; with 30 or more" in log.text


def test_a_rule_of_other_weights_is_not_used(tmp_path, monkeypatch, log):
    workdir = ended_run(tmp_path)
    kept.write_at_end(workdir, config_with(target_coverage=0.9), {"selected_step": 40})
    run = SimpleNamespace(model=workdir.model, step=lambda: 40)
    monkeypatch.setattr(kept, "find_run", lambda checkpoint: run)
    found, content = kept.require(f"{tmp_path}@best")
    assert found == Rule(content["temperature"], "probability", content["threshold"])
    run.step = lambda: 80
    with pytest.raises(UserError, match="--reject needs a decision.json, and .*@last has none for"):
        kept.require(f"{tmp_path}@last")
    assert "was chosen for step 40, and" in log.text and "is step 80" in log.text


def test_another_way_of_showing_images_is_warned_of(tmp_path, log):
    workdir = ended_run(tmp_path)
    config = config_with(target_coverage=0.9, tta="flip")
    kept.write_at_end(workdir, config, {"selected_step": 40})
    kept.require(workdir.model, tta="flip")
    assert "roughly" not in log.text
    kept.require(workdir.model)
    assert "eval.tta='flip' and is used with 'none'" in log.text


@pytest.mark.parametrize("text", ["{", "{}", '{"temperature": 0, "score": "energy"}', "[1]"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "decision.json").write_text(text)
    with pytest.raises(UserError, match=r"decision.json.* cannot be .*choose it again with vitcls"):
        kept.find(tmp_path)
