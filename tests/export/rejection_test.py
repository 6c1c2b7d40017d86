"""The lines of a card answer and reject as the rule does."""

import dataclasses
import json
import logging
import re

import numpy as np
import pytest

from vitcls.decision.rule import Rule
from vitcls.export import rejection


def decision_of(rule: Rule) -> dict:
    labels, logits = np.zeros(4, int), np.eye(3)[[0, 0, 0, 1]]
    return dataclasses.asdict(rule) | rule.measure(labels, logits) | {"split": "holdout"}


@pytest.mark.parametrize(
    ("score", "has_logits"), [("probability", True), ("probability", False), ("energy", True)]
)
def test_the_lines_of_the_card_reject_as_the_rule_does(score, has_logits, tmp_path, monkeypatch):
    logits = np.random.default_rng(0).normal(scale=9, size=(20, 3)).astype(np.float32)
    scores = np.sort(Rule(1.7, score).scores(logits))
    rule = Rule(1.7, score, threshold=float(scores[9:11].mean()))
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "FOLDER" if has_logits else tmp_path
    text = rejection.write(folder, decision_of(rule), has_logits=has_logits)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    probabilities = Rule().probabilities(logits).astype(np.float32)
    answered = []
    for one, shares in zip(logits[:, None], probabilities[:, None], strict=True):
        names = {"logits": one} if has_logits else {"probabilities": shares}
        exec(code, names)
        answered.append(bool(names["is_answered"]))
    assert answered == rule.is_answered(logits).tolist() and sum(answered) == 10
    assert re.search(r"hold-out. There, \d+\.0 % \(95 % interval .* of images are answered", text)


def test_an_energy_needs_logits(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vitcls"), "propagate", True)
    decision = decision_of(Rule(score="energy", threshold=0.5))
    assert rejection.write(tmp_path, decision, has_logits=False) == ""
    assert rejection.write(tmp_path, None, has_logits=True) == ""
    assert "decision.json is left out: its score is the energy" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_rule_that_rejects_everything_does_so_in_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = rejection.write(tmp_path, decision_of(Rule()), has_logits=False)
    names = {"probabilities": np.float32([[1, 0, 0]])}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert names["is_answered"] is False
    assert json.loads((tmp_path / "decision.json").read_text())["threshold"] is None
