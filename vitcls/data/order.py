"""Which example is seen when: pure functions of the seed and the sample's number.

A run's samples are numbered 0, 1, 2, ... over all steps and processes: row r of step s has number
`s * global_batch_size + r`. Everything random about a sample follows from (seed, number), so that
batches do not depend on processes, workers, threads, or where a run was continued.

Random bits come from Philox (Salmon et al. 2011), whose output for a key is the same in every
version of NumPy. A seed is an int in [0, 2**64).
"""

import functools

import numpy as np

from vitcls.errors import UserError

# One stream of random numbers per purpose, for equal seeds and numbers.
SHUFFLE, AUGMENT, HOLD_OUT, TAKE, SAMPLE = range(5)


def bit_generator(seed: int, number: int, *, stream: int) -> np.random.Philox:
    """Random bits that are independent of every other (seed, number, stream)."""
    # The counter's low words count the numbers; its high word is never reached by counting.
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed, number], np.uint64))


def random_keys(hashes: np.ndarray, seed: int, *, stream: int) -> np.ndarray:
    """A random number for each hash, seed and stream, uint64 like `hashes`.

    SplitMix64's mixing function (Steele et al. 2014), twice, with Philox's output for the seed.
    """
    first, second = bit_generator(seed, 0, stream=stream).random_raw(2)
    return _mix(_mix(hashes ^ first) + second)


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def sample_rng(seed: int, number: int) -> np.random.Generator:
    """The generator of all randomness on the host for sample `number`."""
    return np.random.Generator(bit_generator(seed, number, stream=AUGMENT))


def sample_numbers(
    step: int, *, global_batch_size: int, process_index: int = 0, process_count: int = 1
) -> np.ndarray:
    """Numbers of the samples in this process' rows of a step's batch, int64 (b,).

    Process p of P holds rows [p * B / P, (p + 1) * B / P) of a global batch of B.

    Raises:
      UserError: The batch cannot be divided evenly.
    """
    if global_batch_size <= 0 or global_batch_size % process_count:
        raise UserError(
            f"A global batch of {global_batch_size} images is not divisible by {process_count} "
            "processes; choose a multiple."
        )
    local_batch_size = global_batch_size // process_count
    first = step * global_batch_size + process_index * local_batch_size
    return np.arange(first, first + local_batch_size, dtype=np.int64)


def example_indices(numbers: np.ndarray, *, num_examples: int, seed: int) -> np.ndarray:
    """The example that each sample shows, int64 like `numbers`.

    Numbers [e * N, (e + 1) * N) are epoch e, which shows each of the N examples once, in its own
    order.
    """
    epochs, positions = np.divmod(numbers, num_examples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        indices[rows] = _epoch_order(num_examples, seed, int(epoch))[positions[rows]]
    return indices


def cumulative_weights(labels: np.ndarray, *, sampling: str) -> np.ndarray:
    """Running sums of the weights that `sampled_indices` takes, float64 (N,).

    Args:
      labels: Integers (N,).
      sampling: "balanced" samples every class equally often, "sqrt" in proportion to the square
        root of its number of examples. Within a class all examples are equal.
    """
    counts = np.maximum(np.bincount(labels), 1)
    weights = {"balanced": 1 / counts, "sqrt": 1 / np.sqrt(counts)}[sampling]
    return np.cumsum(weights[labels])


def sampled_indices(
    numbers: np.ndarray, *, cumulative_weights: np.ndarray, seed: int
) -> np.ndarray:
    """The example that each sample shows, chosen with replacement, int64 like `numbers`.

    Args:
      numbers: Numbers of the samples, int64 (b,).
      cumulative_weights: From the function of this name.
      seed: Decides which examples.
    """
    bits = [bit_generator(seed, int(number), stream=SAMPLE).random_raw() for number in numbers]
    uniform = (np.array(bits, np.uint64) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    return np.searchsorted(cumulative_weights, uniform * cumulative_weights[-1], side="right")


# A run moves from one epoch to the next. A batch spans more than two only if epochs are short.
@functools.lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    keys = bit_generator(seed, epoch, stream=SHUFFLE).random_raw(num_examples)
    order = np.argsort(keys, kind="stable").astype(np.int32)  # half the memory of int64
    order.flags.writeable = False  # shared by all threads
    return order
