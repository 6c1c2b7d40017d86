"""Metrics equal scikit-learn's, however the split is cut into batches."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from vitcls.evaluate.summary import summarise
from vitcls.step import losses, metrics


def summary(logits, labels, *, batch_size, train_counts=None):
    """Metrics of (N, K) logits fed in padded batches; padding holds nan on purpose."""
    total = None
    num_classes = logits.shape[-1]
    for start in range(0, len(labels), batch_size):
        chunk, chunk_labels = logits[start : start + batch_size], labels[start : start + batch_size]
        missing = batch_size - len(chunk)
        padded = jnp.asarray(np.pad(chunk, ((0, missing), (0, 0)), constant_values=np.nan))
        targets = jax.nn.one_hot(np.pad(chunk_labels, (0, missing)), num_classes)
        mask = jnp.arange(batch_size) < len(chunk)
        sums = metrics.batch_sums(
            padded, targets, losses.cross_entropy(padded, targets), mask.astype(jnp.float32)
        )
        total = metrics.add_sums(total, sums)
    return summarise(total, train_counts=train_counts)


@pytest.mark.parametrize(("num_classes", "num_examples"), [(10, 203), (6, 4), (40, 60), (2, 50)])
@pytest.mark.parametrize("batch_size", [8, 64])
def test_equals_scikit_learn(num_classes, num_examples, batch_size):
    rng = np.random.default_rng(num_classes)
    logits = rng.normal(size=(num_examples, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, num_examples)
    got = summary(logits, labels, batch_size=batch_size)
    predictions = logits.argmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
            labels, predictions, average="macro", zero_division=0
        )
        balanced = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert got["num_examples"] == num_examples
    assert got["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    assert got["balanced_accuracy"] == pytest.approx(balanced)
    assert got["macro_precision"] == pytest.approx(precision)
    assert got["macro_recall"] == pytest.approx(recall)
    assert got["macro_f1"] == pytest.approx(f1)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_loss = sklearn.metrics.log_loss(labels, probabilities, labels=range(num_classes))
    assert got["loss"] == pytest.approx(log_loss, rel=1e-5)
    if num_classes > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(num_classes))
        assert got["top5_accuracy"] == pytest.approx(top5)
    else:
        assert "top5_accuracy" not in got


def test_equal_logits_count_as_the_first_class():
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    got = summary(np.zeros((8, 8), np.float32), labels, batch_size=8)
    assert got["accuracy"] == 1 / 8
    assert got["top5_accuracy"] == 5 / 8


def test_nan_logits_are_wrong_not_right():
    got = summary(np.full((4, 6), np.nan, np.float32), np.array([1, 2, 3, 4]), batch_size=4)
    assert got["accuracy"] == got["top5_accuracy"] == 0
    assert np.isnan(got["loss"])


def test_head_medium_and_tail_are_recalls_of_the_classes_trained_on_so_often():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(300, 7)).astype(np.float32)
    labels = rng.integers(0, 6, 300)  # class 6 is never a label
    train_counts = np.array([1000, 101, 100, 20, 19, 0, 5])
    got = summary(logits, labels, batch_size=64, train_counts=train_counts)
    recall = sklearn.metrics.recall_score(
        labels, logits.argmax(-1), average=None, labels=range(7), zero_division=0
    )
    assert got["head_accuracy"] == pytest.approx(recall[:2].mean())
    assert got["medium_accuracy"] == pytest.approx(recall[2:4].mean())
    assert got["tail_accuracy"] == pytest.approx(recall[4:6].mean())
    only_head = summary(logits, labels, batch_size=64, train_counts=np.full(7, 101))
    assert only_head["head_accuracy"] == only_head["balanced_accuracy"]
    assert not {"medium_accuracy", "tail_accuracy"} & set(only_head)
