"""Heads on features are those of scikit-learn, and a sweep is its trials one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from vitcls.probe import heads

NUM_CLASSES = 4


def examples(num: int, dim: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes of different sizes, features of different scales."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(NUM_CLASSES, num, p=[0.4, 0.3, 0.2, 0.1]).astype(np.int32)
    labels[:NUM_CLASSES] = range(NUM_CLASSES)
    centres = np.random.default_rng(9).normal(size=(NUM_CLASSES, dim))
    features = (centres[labels] + 1.5 * rng.normal(size=(num, dim))) * np.linspace(0.1, 3, dim) + 1
    return features.astype(np.float32), labels


TRAIN, TEST = examples(150, 12), examples(300, 12, seed=1)


def test_neighbours_are_those_of_sklearn():
    tried = (1, 7, 150)
    votes = heads.neighbour_votes(
        *TRAIN, TEST[0], num_neighbours=tried, num_classes=NUM_CLASSES
    )  # fmt: skip
    assert votes.shape == (300, len(tried), NUM_CLASSES)
    for position, k in enumerate(tried):
        theirs = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distances: np.exp(-distances / 0.07)
        ).fit(*TRAIN)
        shares = votes[:, position] / votes[:, position].sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(shares, theirs.predict_proba(TEST[0]), atol=1e-4)


@pytest.mark.parametrize("num", [150, 9])  # more and fewer than features
def test_ridge_is_that_of_sklearn(num, monkeypatch):
    monkeypatch.setattr(heads, "_NUM_ROWS", 64)
    features, labels = TRAIN[0][:num], TRAIN[1][:num]
    regularisers = (1e-2, 1.0, 1e3)
    found = heads.ridge(features, labels, regularisers=regularisers, num_classes=NUM_CLASSES)
    targets = 2 * np.eye(NUM_CLASSES)[labels] - 1
    for position, alpha in enumerate(regularisers):
        theirs = Ridge(alpha, solver="svd").fit(features.astype(np.float64), targets)
        np.testing.assert_allclose(found.kernel[position], theirs.coef_, atol=1e-8)
        np.testing.assert_allclose(found.bias[position], theirs.intercept_, atol=1e-8)


def test_the_scaling_is_sklearns_and_folds_into_a_head():
    scaling = heads.scaling_of(TRAIN[0])
    theirs = StandardScaler().fit(TRAIN[0].astype(np.float64))
    np.testing.assert_allclose(scaling(TEST[0]), theirs.transform(TEST[0]), atol=1e-4)
    rng = np.random.default_rng(0)
    head = heads.Linear(rng.normal(size=(NUM_CLASSES, 12)), rng.normal(size=NUM_CLASSES))
    folded = scaling.fold(head)
    np.testing.assert_allclose(
        TEST[0] @ folded.kernel.T + folded.bias, scaling(TEST[0]) @ head.kernel.T + head.bias,
        atol=1e-4,
    )  # fmt: skip
    constant = np.ones((5, 2), np.float32)
    assert np.isfinite(heads.scaling_of(constant)(constant)).all()


def test_a_long_probe_converges_to_sklearns_logistic_regression():
    features, labels = map(jnp.asarray, (heads.scaling_of(TRAIN[0])(TRAIN[0]), TRAIN[1]))
    weight_decay = 0.03
    found = heads.fit_probe(
        features, labels, 0, 0.3, weight_decay,
        num_classes=NUM_CLASSES, num_epochs=2000, batch_size=len(labels),
    )  # fmt: skip
    theirs = LogisticRegression(C=1 / (weight_decay * len(labels)), tol=1e-8, max_iter=1000)
    theirs.fit(np.asarray(features, np.float64), labels)
    np.testing.assert_allclose(found.kernel, theirs.coef_, atol=1e-4)
    # Theirs is regularised to sum to zero only through the kernel: biases may differ by a constant.
    biases = found.bias - found.bias.mean(), theirs.intercept_ - theirs.intercept_.mean()
    np.testing.assert_allclose(*biases, atol=1e-4)


def test_steps_are_optaxs_on_batches_that_cover_the_examples():
    """One epoch of 3 batches against a plain loop, with the batches of the seed."""
    features, labels = map(jnp.asarray, TRAIN)
    found = heads.fit_probe(
        features, labels, 5, 0.01, 0.1, num_classes=NUM_CLASSES, num_epochs=1, batch_size=50
    )
    key = jax.random.split(jax.random.key(5), 1)[0]
    order = np.asarray(jax.random.permutation(key, 150))
    assert sorted(order) == list(range(150))
    tx = optax.sgd(optax.cosine_decay_schedule(0.01, 3), momentum=0.9)
    params = jnp.zeros((12, NUM_CLASSES)), jnp.zeros(NUM_CLASSES)
    state = tx.init(params)

    def loss(params, rows):
        logits = features[rows] @ params[0] + params[1][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return losses.mean() + 0.1 / 2 * (params[0] ** 2).sum()

    @jax.jit
    def step(params, state, rows):
        updates, state = tx.update(jax.grad(loss)(params, rows), state)
        return optax.apply_updates(params, updates), state

    for rows in order.reshape(3, 50):
        params, state = step(params, state, rows)
    np.testing.assert_allclose(found.kernel, params[0].T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.bias, params[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at_once", [6, 4])  # 4: a chunk and a remainder
def test_a_trial_of_the_sweep_is_the_trial_alone(at_once):
    options = dict(num_classes=NUM_CLASSES, num_epochs=3, batch_size=64)
    lrs = np.array([1e-3, 1e-2, 1e-1] * 2, np.float32)
    weight_decays = np.array([0.0, 0.1] * 3, np.float32)
    seeds = np.array([3, 8])
    found = heads.fit_probes(*TRAIN, seeds, lrs, weight_decays, at_once=at_once, **options)
    assert found.kernel.shape == (2, 6, NUM_CLASSES, 12)
    alone = jax.jit(functools.partial(heads.fit_probe, **options))
    for row, seed in enumerate(seeds):
        for column, (lr, weight_decay) in enumerate(zip(lrs, weight_decays, strict=True)):
            expected = alone(*TRAIN, seed, lr, weight_decay)
            for one, other in zip(expected, found, strict=True):
                np.testing.assert_allclose(other[row, column], one, rtol=1e-4, atol=1e-6)
    assert np.abs(found.kernel[0] - found.kernel[1]).max() > 1e-4  # seeds matter


def test_a_head_that_diverged_is_right_nowhere():
    kernel = np.full((1, NUM_CLASSES, 12), np.nan, np.float32)
    stacked = heads.Linear(kernel, np.zeros((1, NUM_CLASSES), np.float32))
    assert (TEST[1] == 0).any()  # what an argmax of nan says
    assert not heads.hits(stacked, *TEST).any()
    accuracy, loss = heads.score(stacked, *TEST)
    assert accuracy == 0 and np.isnan(loss)


def test_scores_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(2, 3, NUM_CLASSES, 12)), rng.normal(size=(2, 3, NUM_CLASSES))
    kernel /= 10
    stacked = heads.Linear(kernel.astype(np.float32), bias.astype(np.float32))
    accuracy, loss = heads.score(stacked, *TEST)
    assert accuracy.shape == loss.shape == (2, 3)
    logits = TEST[0] @ kernel[1, 2].T + bias[1, 2]
    assert accuracy[1, 2] == pytest.approx(accuracy_score(TEST[1], logits.argmax(-1)))
    assert loss[1, 2] == pytest.approx(log_loss(TEST[1], softmax(logits, axis=-1)), rel=1e-4)
    hits = heads.hits(jax.tree.map(lambda leaf: leaf[1], stacked), *TEST)
    np.testing.assert_array_equal(hits[2], logits.argmax(-1) == TEST[1])
    np.testing.assert_allclose(hits.mean(axis=1), accuracy[1], rtol=1e-6)
