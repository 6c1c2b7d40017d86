"""Thresholds keep their promise on new images, and intervals are scipy's."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from vitcls.decision import rule
from vitcls.decision.rule import Rule, fit_rule
from vitcls.errors import UserError


def sample(num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits and the chance of each answer to be right, 0.92 on average."""
    chances = 0.9999 - 0.4 * rng.random(num) ** 4
    logits = np.stack([np.log(chances / (1 - chances)), np.zeros(num)], axis=1)
    return (rng.random(num) > chances).astype(int), logits, chances


@pytest.mark.parametrize(("num", "target"), [(150, 0.9), (150, 0.95), (1000, 0.95), (1000, 0.97)])
def test_the_precision_promised_is_missed_by_few_hold_outs(num, target):
    rng, missed, coverages = np.random.default_rng(0), 0, []
    _, new_logits, chances = sample(20_000, rng)
    for _ in range(100):
        found = fit_rule(*sample(num, rng)[:2], target_precision=target)
        answered = found.is_answered(new_logits)
        coverages.append(answered.mean())
        missed += answered.any() and chances[answered].mean() < target
    # 5 of 100 are allowed, and 10 or more of 100 have a chance of 3 % then.
    assert missed < 10
    if num == 1000 and target == 0.95:
        assert np.mean(coverages) > 0.6


def test_the_coverage_is_that_of_new_images_on_average():
    rng, coverages = np.random.default_rng(0), []
    _, new_logits, _ = sample(20_000, rng)
    for _ in range(200):
        found = fit_rule(*sample(60, rng)[:2], target_coverage=0.8)
        coverages.append(found.is_answered(new_logits).mean())
    assert 0.8 - 0.01 < np.mean(coverages) < 0.8 + 2 / 61


def test_everything_is_answered_where_that_is_precise_enough():
    labels = np.arange(300) % 3
    logits = np.eye(3)[labels] * np.linspace(1, 9, 300)[:, None]
    found = fit_rule(labels, logits, target_precision=0.9)
    assert found.is_answered(logits).all() and found.temperature == 1.0
    assert 0 < found.threshold < found.scores(logits).min()


def test_what_cannot_be_promised_rejects_every_image():
    labels, logits, _ = sample(200, np.random.default_rng(0))
    found = fit_rule(labels, logits, target_precision=0.999)
    assert found.threshold is None and not found.is_answered(logits).any()
    measured = found.measure(labels, logits)
    assert measured["coverage"]["value"] == 0 and measured["precision"]["value"] is None
    highest = rule.highest_target(labels, logits, found)
    assert fit_rule(labels, logits, target_precision=highest).threshold is not None
    assert fit_rule(labels, logits, target_precision=highest + 0.01).threshold is None
    assert rule.highest_target(1 - logits.argmax(axis=1), logits, found) == 0  # all are wrong


def test_few_images_all_right_promise_what_their_number_allows():
    labels, logits = np.zeros(20, int), np.eye(2)[np.zeros(20, int)] * 5
    assert fit_rule(labels, logits, target_precision=0.86).threshold is not None  # 0.05^(1/20)
    assert fit_rule(labels, logits, target_precision=0.87).threshold is None
    assert fit_rule(labels[:1], logits[:1], target_coverage=0.9).is_answered(logits).all()


def test_equal_scores_are_answered_together():
    labels, logits = np.zeros(100, int), np.eye(2)[np.zeros(100, int)] * 5
    assert fit_rule(labels, logits, target_coverage=0.3).is_answered(logits).all()
    labels = np.arange(100) % 2  # all tied, and half of them wrong
    assert fit_rule(labels, logits, target_precision=0.6).threshold is None


@pytest.mark.parametrize("score", rule.SCORES)
def test_a_lower_target_answers_more(score):
    labels, logits, _ = sample(2000, np.random.default_rng(1))
    shares = [
        fit_rule(labels, logits, target_precision=target, score=score).is_answered(logits).mean()
        for target in (0.97, 0.95, 0.93, 0.8)
    ]
    assert shares == sorted(shares) and shares[0] < shares[-1] == 1


def test_energy_is_the_logarithm_of_the_sum_and_probability_is_calibrated():
    logits = np.array([[1.0, 2.0], [800.0, 0.0]], np.float32)
    assert Rule(score="energy").scores(logits) == pytest.approx([np.log(np.exp([1, 2]).sum()), 800])
    halved = Rule(temperature=2.0)
    assert halved.scores(logits) == pytest.approx([1 / (1 + np.exp(-0.5)), 1])
    np.testing.assert_allclose(halved.probabilities(logits).sum(axis=1), 1)


@pytest.mark.parametrize(("right", "num"), [(0, 1), (0, 50), (7, 9), (499, 500), (30, 30)])
def test_intervals_and_bounds_are_those_of_clopper_and_pearson(right, num):
    exact = stats.binomtest(right, num).proportion_ci(method="exact")
    found = rule.interval(right, num)
    assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high))
    one_sided = stats.binomtest(right, num, alternative="greater").proportion_ci(method="exact")
    assert rule.lower_bound(right, num) == pytest.approx(one_sided.low)


def test_the_area_is_scikit_learns():
    rng = np.random.default_rng(0)
    known, unknown = np.round(rng.uniform(0.4, 1, 80), 1), np.round(rng.uniform(0.2, 0.9, 50), 1)
    expected = sk.roc_auc_score([1] * 80 + [0] * 50, np.concatenate([known, unknown]))
    assert rule.auroc(known, unknown) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, "probability", 0.5), "temperature=0.0 must be above 0"),
        ((1.0, "enrgy", 0.5), "Did you mean 'energy'?"),
        ((1.0, "energy", "high"), "must be finite numbers"),
        ((1.0, "energy", float("nan")), "must be finite numbers"),
    ],
)
def test_a_rule_of_other_values_is_refused(values, message):
    with pytest.raises(UserError) as error:
        Rule(*values)
    assert message in str(error.value)
