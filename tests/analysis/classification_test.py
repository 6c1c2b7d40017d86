"""Metrics equal scikit-learn's, also of resamples, ties and degenerate data."""

import warnings

import numpy as np
import pytest
from sklearn import calibration, exceptions
from sklearn import metrics as sk

from vitcls.analysis import classification, weighted
from vitcls.analysis.predictions import Predictions
from vitcls.decision.rule import fit_temperature


def make(labels, logits) -> Predictions:
    labels = np.asarray(labels, np.int32)
    return Predictions(labels, np.asarray(logits, np.float32), np.arange(len(labels)).astype(str))


def drawn(num: int, num_classes: int, *, seed: int = 0, scale: float = 2.0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num)
    logits = rng.normal(size=(num, num_classes)) * scale
    logits[np.arange(num), labels] += scale
    return make(labels, logits)


def rounded(found: Predictions) -> Predictions:
    """Many ties, within a row and down a column."""
    return make(found.labels, np.round(found.logits))


CASES = {
    "random": drawn(200, 7),
    "two classes": drawn(60, 2, seed=1),
    "ties": rounded(drawn(150, 6, seed=2, scale=1.0)),
    "all tied": make([0, 1, 2, 1], np.zeros((4, 3))),
    "one class in the labels": make([1] * 5, np.random.default_rng(3).normal(size=(5, 4))),
    "one class at all": make([0, 0, 0], np.ones((3, 1))),
    "classes without positives": make([0, 3, 3, 0], np.random.default_rng(4).normal(size=(4, 8))),
    "probabilities 0 and 1": make([0, 1, 2, 0], 1e4 * np.eye(3)[[0, 1, 1, 2]]),
    "no mistake": make([0, 1, 2, 0], 9 * np.eye(3)[[0, 1, 2, 0]]),
    "all wrong": make([0, 1, 2, 0], 9 * np.eye(3)[[1, 2, 0, 1]]),
    "one image": make([1], [[0.0, 2.0, 1.0]]),
}


def areas(found: Predictions) -> tuple[list[float], list[float]]:
    """Of every class that has positives and negatives."""
    found_areas = [], []
    for k in np.unique(found.labels):
        if 0 < (found.labels == k).sum() < len(found.labels):
            scores = found.probabilities[:, k]
            found_areas[0].append(sk.roc_auc_score(found.labels == k, scores))
            found_areas[1].append(sk.average_precision_score(found.labels == k, scores))
    return found_areas


def sklearn_ece(is_right, probabilities, strategy: str) -> float:
    """From scikit-learn's bins; their sizes are found from its own edges."""
    accuracy, confidence = calibration.calibration_curve(
        is_right, probabilities, n_bins=15, strategy=strategy
    )
    edges = np.linspace(0, 1, 16)
    if strategy == "quantile":
        edges = np.percentile(probabilities, edges * 100)
    sizes = np.bincount(np.searchsorted(edges[1:-1], probabilities), minlength=15)
    sizes = sizes[sizes > 0]
    return float((sizes * np.abs(accuracy - confidence)).sum() / sizes.sum())


def reference(found: Predictions) -> dict[str, float]:
    """By scikit-learn; what it has no function for, straight from the definition."""
    labels, p = found.labels, found.probabilities
    num_classes = p.shape[1]
    predicted, confidence = found.logits.argmax(1), p.max(1)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "ece": sklearn_ece(predicted == labels, confidence, "uniform"),
        "ece_equal_mass": sklearn_ece(predicted == labels, confidence, "quantile"),
        "classwise_ece": np.mean(
            [sklearn_ece(labels == k, p[:, k], "uniform") for k in range(num_classes)]
        ),
        "brier": np.mean(((p - np.eye(num_classes)[labels]) ** 2).sum(1)),
        "aurc": np.mean([np.mean((predicted != labels)[confidence >= c]) for c in confidence]),
    }
    for average in ("macro", "micro", "weighted"):
        values = sk.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            expected[f"{average}_{name}"] = value
    auc, precision = areas(found)
    expected["roc_auc"] = np.mean(auc) if auc else np.nan
    expected["average_precision"] = np.mean(precision) if precision else np.nan
    if num_classes > 1:
        # scikit-learn clips, which is left out by what it compares with.
        at_label = p[np.arange(len(labels)), labels]
        if at_label.min() > 1e-12:
            expected["log_loss"] = sk.log_loss(labels, p, labels=range(num_classes))
        expected["brier"] = sk.brier_score_loss(
            labels, p, labels=range(num_classes), scale_by_half=False
        )
    return expected


@pytest.fixture(autouse=True)
def _undefined_is_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.UndefinedMetricWarning)
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", message="A single label was found")
        yield


@pytest.mark.parametrize("name", CASES)
def test_metrics_equal_scikit_learns(name):
    found = CASES[name]
    summary = classification.summarise(found, num_resamples=0)
    for metric, value in reference(found).items():
        np.testing.assert_allclose(summary[metric].value, value, atol=1e-9, err_msg=metric)


@pytest.mark.parametrize("name", ["random", "two classes", "ties", "classes without positives"])
def test_a_resample_is_what_scikit_learn_says_of_repeated_images(name):
    found = CASES[name]
    (weights,) = classification.resamples(len(found.labels), 3, seed=5)
    families = [
        weighted.means(found.labels, found.logits),
        weighted.by_class(found.labels, found.logits),
        weighted.selective(found.labels, found.probabilities),
        weighted.calibration(found.labels, found.probabilities),
        weighted.classwise_calibration(found.labels, found.probabilities),
        weighted.ranking(found.labels, found.probabilities),
    ]
    computed = {metric: x for compute in families for metric, x in compute(weights).items()}
    for row, counts in enumerate(weights.astype(int)):
        assert counts.sum() == len(found.labels)
        chosen = np.repeat(np.arange(len(counts)), counts)
        repeated = make(found.labels[chosen], found.logits[chosen])
        for metric, value in reference(repeated).items():
            if metric != "ece_equal_mass":  # whose bins stay those of the data
                np.testing.assert_allclose(computed[metric][row], value, atol=1e-9, err_msg=metric)


def test_top_5_equals_scikit_learns_and_ties_go_to_the_first_class():
    found = CASES["random"]
    expected = sk.top_k_accuracy_score(found.labels, found.logits, k=5, labels=range(7))
    assert classification.summarise(found, num_resamples=0)["top5_accuracy"].value == expected
    tied = make([0, 4, 5, 6], np.zeros((4, 7)))
    summary = classification.summarise(tied, num_resamples=0)
    assert summary["top5_accuracy"].value == 0.5 and summary["accuracy"].value == 0.25
    few = classification.summarise(CASES["no mistake"], num_resamples=0)
    assert "top5_accuracy" not in few  # of three classes


def test_log_loss_of_certain_mistakes_is_exact_not_clipped():
    summary = classification.summarise(CASES["probabilities 0 and 1"], num_resamples=0)
    assert summary["log_loss"].value == pytest.approx(1e4 * 2 / 4)


def test_metrics_equal_what_a_run_reports():
    import jax.numpy as jnp

    from vitcls.evaluate.summary import summarise
    from vitcls.step import metrics

    found = CASES["ties"]
    logits, targets = jnp.asarray(found.logits), jnp.eye(6)[found.labels]
    loss = -(targets * (logits - jnp.log(jnp.exp(logits).sum(1, keepdims=True)))).sum(1)
    sums = metrics.batch_sums(logits, targets, loss, jnp.ones(len(logits)))
    reported = summarise(metrics.add_sums(None, sums))
    summary = classification.summarise(found, num_resamples=0)
    for name in ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_precision", "macro_f1"):
        assert summary[name].value == pytest.approx(reported[name], abs=1e-6), name
    assert summary["log_loss"].value == pytest.approx(reported["loss"], abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_confusion_and_classes_equal_scikit_learns(name):
    found = CASES[name]
    num_classes, predicted = found.logits.shape[1], found.logits.argmax(1)
    every = np.arange(num_classes)
    np.testing.assert_array_equal(
        classification.confusion(found), sk.confusion_matrix(found.labels, predicted, labels=every)
    )
    matrix = classification.confusion(found)
    pairs = classification.confused_pairs(found)
    assert {(i, j): num for i, j, num in pairs} == {
        (i, j): matrix[i, j] for i, j in np.argwhere(matrix) if i != j
    }
    assert [num for *_, num in pairs] == sorted((num for *_, num in pairs), reverse=True)
    table = classification.per_class(found)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        found.labels, predicted, labels=every, zero_division=0
    )
    np.testing.assert_array_equal(table["images"], support)
    np.testing.assert_allclose(table["precision"], precision)
    for metric, expected in (("recall", recall), ("f1", f1)):
        expected = np.where(support > 0, expected, np.nan)
        np.testing.assert_allclose(table[metric], expected, err_msg=metric)
    for k in every:
        if 0 < support[k] < len(found.labels):
            scores = found.probabilities[:, k]
            expected = sk.roc_auc_score(found.labels == k, scores)
            assert table["roc_auc"][k] == pytest.approx(expected)
        else:
            assert np.isnan(table["roc_auc"][k])


def test_reliability_is_scikit_learns_curve():
    found = CASES["random"]
    curve = classification.reliability(found)
    accuracy, confidence = calibration.calibration_curve(
        found.probabilities.argmax(1) == found.labels, found.probabilities.max(1), n_bins=15
    )
    np.testing.assert_allclose(curve["accuracy"], accuracy)
    np.testing.assert_allclose(curve["confidence"], confidence)
    assert curve["images"].sum() == 200


def test_temperature_is_where_torch_finds_the_least_loss():
    import torch

    found = make(CASES["random"].labels, 3 * CASES["random"].logits)
    temperature = fit_temperature(found.labels, found.logits)
    logits, labels = torch.tensor(found.logits).double(), torch.tensor(found.labels).long()
    inverse = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits * inverse, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert temperature == pytest.approx(1 / inverse.item(), rel=1e-3)
    assert 1 < temperature < 20
    scaled = classification.at_temperature(found, temperature)
    before, after = (classification.summarise(one, num_resamples=0) for one in (found, scaled))
    assert after["log_loss"].value < before["log_loss"].value
    assert after["accuracy"].value == before["accuracy"].value
    assert after["ece"].value < before["ece"].value


@pytest.mark.parametrize("name", ["no mistake", "all wrong", "one class at all", "all tied"])
def test_temperature_stays_in_its_bounds(name):
    temperature = fit_temperature(CASES[name].labels, CASES[name].logits)
    assert temperature is None or 0.05 <= temperature <= 20.01


def test_no_temperature_is_fitted_where_all_are_right():
    """The least loss would be at zero."""
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    labels, ids = np.array([0, 1, 2, 2]), np.arange(4).astype(str)
    found = Predictions(labels=labels, logits=logits, ids=ids)
    assert fit_temperature(found.labels, found.logits) is None
    wrong = Predictions(labels=labels[::-1], logits=logits, ids=ids)
    assert fit_temperature(wrong.labels, wrong.logits) is not None


def test_unknown_images_are_told_apart_as_scikit_learns_area_says():
    rng = np.random.default_rng(0)
    known, unknown = np.round(rng.uniform(0.4, 1, 80), 1), np.round(rng.uniform(0.2, 0.9, 50), 1)
    found = classification.unknown_auroc(known, unknown)
    expected = sk.roc_auc_score([1] * 80 + [0] * 50, np.concatenate([known, unknown]))
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


def test_intervals_are_of_the_seed_and_as_wide_as_theory_says():
    found = drawn(400, 6)
    first, again, other = (
        classification.summarise(found, num_resamples=300, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again and first != other
    value = first["accuracy"]
    error = 1.96 * np.sqrt(value.value * (1 - value.value) / 400)
    assert value.high - value.low == pytest.approx(2 * error, rel=0.15)
    for name, one in first.items():
        assert one.low <= one.high, name
    # DeLong's variance, averaged over classes, would be near; the interval is around the value.
    assert first["roc_auc"].low < first["roc_auc"].value < first["roc_auc"].high


def test_interval_of_a_resample_like_scipys():
    from scipy import stats

    found = drawn(150, 3, seed=9)
    expected = stats.bootstrap(
        (found.labels, found.logits.argmax(1)), lambda a, b: sk.f1_score(a, b, average="macro"),
        paired=True, vectorized=False, n_resamples=400, method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    one = classification.summarise(found, num_resamples=2000)["macro_f1"]
    np.testing.assert_allclose([one.low, one.high], expected, atol=0.02)


@pytest.mark.parametrize("name", CASES)
def test_intervals_of_degenerate_data_are_numbers_or_nan(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no division by 0 either
        summary = classification.summarise(CASES[name], num_resamples=50)
        classification.per_class(CASES[name])
        classification.reliability(CASES[name])
    for metric, one in summary.items():
        assert np.isnan(one.value) == np.isnan(one.low) == np.isnan(one.high), metric


def test_without_a_mistake_the_bound_is_exact():
    # No mistake in 360: (1 - q)^360 = 0.05.
    assert classification.surely_above(360, 360) == pytest.approx(0.05 ** (1 / 360))


def test_too_many_probabilities_leave_metrics_of_all_of_them_without_intervals(monkeypatch):
    monkeypatch.setattr(classification, "_MAX_PROBABILITIES", 200 * 7 * 100)
    summary = classification.summarise(CASES["random"])
    assert np.isnan(summary["roc_auc"].low) and summary["roc_auc"].value > 0.5
    assert summary["accuracy"].low < summary["accuracy"].high
