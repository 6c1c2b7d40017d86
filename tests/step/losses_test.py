"""Losses equal those of optax and torch, or what their papers say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional

from vitcls.errors import UserError
from vitcls.step import losses
from vitcls.step import train_step as steps

COUNTS = np.array([500, 100, 20, 3, 0])
CLASSES = ("a", "b", "c", "d", "e")


def test_cross_entropy_equals_optax_on_dense_targets():
    logits = 10 * jax.random.normal(jax.random.key(0), (16, 7))
    targets = jax.nn.softmax(jax.random.normal(jax.random.key(1), (16, 7)))
    np.testing.assert_allclose(
        losses.cross_entropy(logits, targets),
        optax.softmax_cross_entropy(logits, targets),
        rtol=1e-6,
    )


def test_cross_entropy_of_a_zero_head_is_ln_k():
    np.testing.assert_allclose(
        losses.cross_entropy(jnp.zeros((3, 10)), jnp.eye(10)[:3]), np.log(10), rtol=1e-6
    )


@pytest.fixture
def logits():
    return np.asarray(3 * jax.random.normal(jax.random.key(0), (16, 5)))


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, 5, 16)


@pytest.fixture
def dense():
    return np.asarray(jax.nn.softmax(jax.random.normal(jax.random.key(1), (16, 5))))


def make(name="cross_entropy", *, gamma=2.0, logit_adjustment=0.0):
    return losses.make_loss(
        name, gamma=gamma, logit_adjustment=logit_adjustment, class_counts=COUNTS
    )


def mean_loss(loss, weights, logits, targets, mask):
    """The loss that the step minimises, of a network that returns `logits`."""
    loss_fn = steps.make_loss_fn(lambda *args, **kwargs: (logits, {}), loss, weights)
    loss_sum, (weight_sum, _) = loss_fn({}, ({}, None), {}, None, targets, mask, None)
    return loss_sum / weight_sum


@pytest.mark.parametrize(
    "how", ["balanced", "effective", '{"e": 0, "d": 7, "c": 2, "b": 1, "a": 1}']
)
def test_class_weights_and_their_normalisation_are_those_of_torch(how, logits, labels):
    weights = losses.class_weights(how, CLASSES, COUNTS, beta=0.99)
    mask = np.r_[np.zeros(3, np.float32), np.ones(13, np.float32)]
    got = mean_loss(make(), weights, logits, np.eye(5, dtype=np.float32)[labels], mask)
    expected = functional.cross_entropy(
        torch.tensor(logits[3:]), torch.tensor(labels[3:]), weight=torch.tensor(weights)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_weight_of_a_dense_target_is_its_mean_under_it(logits):
    weights = np.float32([1, 2, 3, 4, 5])
    targets = np.float32([[0.5, 0, 0, 0, 0.5]] * 16)
    mask = np.float32([1] + [0] * 15)
    got, (weight, _) = steps.make_loss_fn(lambda *a, **k: (logits, {}), make(), weights)(
        {}, ({}, None), {}, None, targets, mask, None
    )
    assert weight == 3
    np.testing.assert_allclose(got, 3 * make()(logits, targets)[0], rtol=1e-6)


def test_class_weights_are_those_of_their_definitions():
    counts = np.array([90, 10])
    balanced = losses.class_weights("balanced", ("a", "b"), counts, beta=0.9)
    np.testing.assert_allclose(balanced, [100 / 180, 100 / 20])
    assert (balanced * counts).sum() / 100 == pytest.approx(1)
    effective = losses.class_weights("effective", ("a", "b"), counts, beta=0.9)
    # 1 / (1 + 0.9 + 0.81 + ... n terms)
    sums = [sum(0.9**i for i in range(n)) for n in counts]
    np.testing.assert_allclose(effective, 1 / np.array(sums), rtol=1e-6)
    assert losses.class_weights("none", ("a", "b"), counts, beta=0.9) is None


def test_a_table_names_every_class_once():
    table = '{"a": 1, "b": 2, "c": 3, "d": 4, "f": 5}'
    with pytest.raises(UserError, match=r"\['e'\] are missing, \['f'\] are not among"):
        losses.class_weights(table, CLASSES, COUNTS, beta=0.9)


def test_focal_is_the_formula_of_its_paper_on_dense_targets(logits, dense):
    log_p = torch.log_softmax(torch.tensor(logits).double(), -1)
    terms = torch.tensor(dense) * (1 - log_p.exp()) ** 1.5 * -log_p
    np.testing.assert_allclose(make("focal", gamma=1.5)(logits, dense), terms.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(make("focal", gamma=0.0)(logits, dense), make()(logits, dense))


def test_sigmoid_is_torchs_summed_over_classes(logits, dense):
    expected = functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(dense), reduction="none"
    ).sum(-1)
    np.testing.assert_allclose(make("sigmoid")(logits, dense), expected, rtol=1e-5)


def test_logit_adjustment_of_1_is_balanced_softmax(logits, labels):
    """Ren et al.: -log(n_y e^y / sum_k n_k e^k); a class without images counts as one."""
    numbers = np.maximum(COUNTS, 1) * np.exp(np.float64(logits))
    expected = -np.log(numbers[np.arange(16), labels] / numbers.sum(-1))
    got = make(logit_adjustment=1.0)(logits, np.eye(5, dtype=np.float32)[labels])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_logit_adjustment_makes_the_balanced_classifier_from_skewed_data():
    """Of images that say nothing the best adjusted logits are equal: no class is preferred."""
    counts = np.array([90, 10])
    loss = losses.make_loss("cross_entropy", gamma=0, logit_adjustment=1.0, class_counts=counts)
    shares = jnp.asarray([[0.9, 0.1]])
    np.testing.assert_allclose(
        jax.grad(lambda x: loss(x, shares)[0])(jnp.zeros((1, 2))), 0, atol=1e-6
    )


@pytest.mark.parametrize(
    "loss",
    [make(), make(logit_adjustment=2.0), make("sigmoid")]
    + [make("focal", gamma=gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)],
)
def test_extreme_logits_have_finite_losses_and_gradients(loss):
    logits = jnp.asarray([[1e4, -1e4, 0, 0, 0], [0, 0, 1e4, 0, 0], [60, 0, 0, 0, 0]])
    for targets in (jnp.eye(5)[jnp.array([0, 0, 0])], jnp.full((3, 5), 0.2)):
        value, grads = jax.value_and_grad(lambda x, t=targets: loss(x, t).sum())(logits)
        assert np.isfinite(value) and np.isfinite(grads).all()
