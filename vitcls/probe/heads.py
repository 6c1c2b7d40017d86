"""Heads on precomputed features: nearest neighbours, ridge regression, softmax regression.

N examples, M queries, D features, K classes, k neighbours, B batch, T hyper-parameters, S seeds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Temperature of neighbours' weights: Wu et al. 2018 (arXiv:1805.01978), section 3.4.
TEMPERATURE = 0.07
MOMENTUM = 0.9  # of the probe's SGD
_EPSILON = 1e-6  # added to standard deviations, since a feature may not vary
_NUM_ROWS = 1 << 14  # examples that ridge regression converts to float64 at a time
_NUM_QUERIES = 128  # queries whose similarities to all examples are in memory at a time


class Linear(NamedTuple):
    """Logits `features @ kernel.T + bias`; leading dimensions stack several heads."""

    kernel: np.ndarray  # (..., K, D)
    bias: np.ndarray  # (..., K)


class Scaling(NamedTuple):
    """Gives every feature mean 0 and standard deviation 1: `(features - mean) / std`."""

    mean: np.ndarray  # float32 (D,)
    std: np.ndarray  # float32 (D,)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) / self.std

    def fold(self, head: Linear) -> Linear:
        """Returns the float32 head for raw features with the logits of `head` for scaled ones."""
        kernel = np.asarray(head.kernel, np.float64) / self.std
        bias = np.asarray(head.bias, np.float64) - kernel @ self.mean.astype(np.float64)
        return Linear(kernel.astype(np.float32), bias.astype(np.float32))


def scaling_of(features: np.ndarray) -> Scaling:
    """Returns the scaling that standardises `features` (N, D)."""
    mean = features.mean(axis=0, dtype=np.float64)
    std = features.std(axis=0, dtype=np.float64) + _EPSILON
    return Scaling(mean.astype(np.float32), std.astype(np.float32))


@functools.partial(jax.jit, static_argnames=("num_neighbours", "num_classes"))
def neighbour_votes(
    features: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    *,
    num_neighbours: tuple[int, ...],
    num_classes: int,
) -> jax.Array:
    """Votes for the classes of queries by the examples with the largest cosine similarity.

    A neighbour of similarity s has weight exp(s / TEMPERATURE), as in Wu et al. 2018
    (arXiv:1805.01978), section 3.4; here divided by the weight of s = 1.

    Args:
      features: Features of the examples, float32 (N, D).
      labels: Their labels, integers (N,).
      queries: Features of the queries, float32 (M, D).
      num_neighbours: Values of k, each at most N.
      num_classes: K.

    Returns:
      Votes, float32 (M, len(num_neighbours), K).
    """
    bank = _normalised(features)

    def votes(query):  # (D,) -> (number of k, K)
        similarities, nearest = jax.lax.top_k(bank @ query, max(num_neighbours))
        weights = jnp.exp((similarities - 1) / TEMPERATURE)
        found = labels[nearest]
        zeros = jnp.zeros(num_classes)
        return jnp.stack([zeros.at[found[:k]].add(weights[:k]) for k in num_neighbours])

    return jax.lax.map(votes, _normalised(queries), batch_size=_NUM_QUERIES)


def _normalised(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def ridge(
    features: np.ndarray, labels: np.ndarray, *, regularisers: tuple[float, ...], num_classes: int
) -> Linear:
    """Least squares to targets of 1 for the class and -1 for the others, in closed form.

    Minimises sum |W x + b - y|^2 + r |W|^2 for every regulariser r, with one decomposition of the
    smaller of the two Gram matrices in float64. The bias is not regularised. This is the few-shot
    evaluation of Kolesnikov et al. 2020 (arXiv:1912.11370) and Dosovitskiy et al. 2021
    (arXiv:2010.11929).

    Args:
      features: float (N, D).
      labels: Integers (N,).
      regularisers: Positive values of r.
      num_classes: K.

    Returns:
      Stacked float64 heads, one for each regulariser.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    share = np.bincount(labels, minlength=num_classes) / len(labels)
    targets_mean = 2 * share - 1

    def centred(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        x = features[start:stop].astype(np.float64) - mean
        return x, 2 * np.eye(num_classes)[labels[start:stop]] - 1 - targets_mean

    num, dim = features.shape
    if num < dim:
        x, y = centred(0, num)
        values, vectors = np.linalg.eigh(x @ x.T)
        outer, inner = x.T @ vectors, vectors.T @ y
    else:
        gram, moments = np.zeros((dim, dim)), np.zeros((dim, num_classes))
        # A float64 copy of all features would take twice their memory.
        for start in range(0, num, _NUM_ROWS):
            x, y = centred(start, start + _NUM_ROWS)
            gram += x.T @ x
            moments += x.T @ y
        values, outer = np.linalg.eigh(gram)
        inner = outer.T @ moments
    values = np.maximum(values, 0)[:, None]  # rounding can make zeros negative
    kernel = np.stack([(outer @ (inner / (values + r))).T for r in regularisers])
    return Linear(kernel, targets_mean - kernel @ mean)


def fit_probe(
    features: jax.Array,
    labels: jax.Array,
    seed: jax.Array,
    lr: jax.Array,
    weight_decay: jax.Array,
    *,
    num_classes: int,
    num_epochs: int,
    batch_size: int,
) -> Linear:
    """Softmax regression by SGD with momentum and a cosine schedule, from a zero head.

    Minimises the mean cross-entropy + weight_decay / 2 |W|^2; the bias does not decay. An epoch is
    divided into the fewest equal batches of at most `batch_size` examples. The remainder, sampled
    anew each epoch, is left out. The kernel is (K, D): the kernels of many trials are then one
    tall matrix, whose product needs no transposition.

    Args:
      features: float32 (N, D).
      labels: Integers (N,).
      seed: Seed of the order of the examples, integer ().
      lr: Peak learning rate, ().
      weight_decay: ().
      num_classes: K.
      num_epochs: Passes over the examples.
      batch_size: Largest B.

    Returns:
      One float32 head.
    """
    num = len(features)
    num_batches = -(-num // batch_size)
    size = num // num_batches
    decay = optax.cosine_decay_schedule(1.0, num_epochs * num_batches)
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay, mask=Linear(True, False)),
        optax.sgd(lambda step: lr * decay(step), momentum=MOMENTUM),
    )

    def loss(head, rows):
        logits = head.kernel @ features[rows].T + head.bias[:, None]  # (K, B)
        targets = jax.nn.one_hot(labels[rows], num_classes, axis=0)
        return jnp.mean(optax.softmax_cross_entropy(logits, targets, axis=0))

    def step(carry, rows):
        head, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(head, rows), opt_state, head)
        return (optax.apply_updates(head, updates), opt_state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, num)[: num_batches * size]
        return jax.lax.scan(step, carry, order.reshape(num_batches, size))

    head = Linear(jnp.zeros((num_classes, features.shape[1])), jnp.zeros(num_classes))
    keys = jax.random.split(jax.random.key(seed), num_epochs)
    return jax.lax.scan(lambda *args: (epoch(*args)[0], None), (head, tx.init(head)), keys)[0][0]


@functools.partial(jax.jit, static_argnames=("num_classes", "num_epochs", "batch_size", "at_once"))
def fit_probes(
    features: jax.Array,
    labels: jax.Array,
    seeds: jax.Array,
    lrs: jax.Array,
    weight_decays: jax.Array,
    *,
    num_classes: int,
    num_epochs: int,
    batch_size: int,
    at_once: int,
) -> Linear:
    """`fit_probe` for every seed and every pair of hyper-parameters, in one program.

    Trials of one seed see the same batches, so their matrix products are computed as one.

    Args:
      features: float32 (N, D).
      labels: Integers (N,).
      seeds: Integers (S,).
      lrs: (T,).
      weight_decays: (T,), paired with `lrs`.
      num_classes: K.
      num_epochs: See `fit_probe`.
      batch_size: See `fit_probe`.
      at_once: Pairs that are trained together, each with all seeds; see `probe_bytes`.

    Returns:
      float32 heads, stacked (S, T).
    """
    fit = functools.partial(
        fit_probe, num_classes=num_classes, num_epochs=num_epochs, batch_size=batch_size
    )

    def of_seed(seed):
        return jax.lax.map(
            lambda pair: fit(features, labels, seed, *pair),
            (lrs, weight_decays),
            batch_size=at_once,
        )

    return jax.vmap(of_seed)(seeds)


def probe_bytes(dim: int, *, num_classes: int, batch_size: int) -> int:
    """Memory of one trial of `fit_probes`: head, momentum, gradient, their updates, and logits."""
    return 4 * num_classes * (5 * dim + 4 * batch_size)


@jax.jit
def score(heads: Linear, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Accuracy and mean cross-entropy of each head on all examples, float32 (...,).

    Args:
      heads: One head, or stacked heads.
      features: float32 (N, D).
      labels: Integers (N,).
    """

    def of_head(head):
        logits = _logits(head, features)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(_is_right(logits, labels)), jnp.mean(loss)

    shape = heads.bias.shape[:-1]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(shape) :]), heads)
    return jax.tree.map(lambda found: found.reshape(shape), jax.lax.map(of_head, flat))


@jax.jit
def hits(heads: Linear, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Which examples each of S stacked heads gets right, bool (S, N)."""
    return jax.lax.map(lambda head: _is_right(_logits(head, features), labels), heads)


def _is_right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # The argmax of a row with nan is the position of the nan, which is not an answer.
    return (logits.argmax(axis=-1) == labels) & ~jnp.isnan(logits).any(axis=-1)


def _logits(head: Linear, features: jax.Array) -> jax.Array:
    return features @ head.kernel.T + head.bias[None]  # (N, K)
