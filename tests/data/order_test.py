import numpy as np
import pytest
import scipy.stats

from vitcls.data import order
from vitcls.errors import UserError


def test_every_epoch_shows_every_example_once_in_another_order():
    indices = order.example_indices(np.arange(300), num_examples=100, seed=0).reshape(3, 100)
    for epoch in indices:
        assert sorted(epoch) == list(range(100))
        assert (epoch != np.arange(100)).mean() > 0.9
    assert (indices[0] != indices[1]).mean() > 0.9


def test_order_depends_on_the_seed():
    numbers = np.arange(100)
    first, second = (order.example_indices(numbers, num_examples=100, seed=seed) for seed in (0, 1))
    assert (first != second).mean() > 0.9


def test_order_is_uniform_over_positions():
    # The mean position of an example over many epochs is the middle.
    positions = [
        np.argsort(order.example_indices(epoch * 20 + np.arange(20), num_examples=20, seed=3))
        for epoch in range(2000)
    ]
    np.testing.assert_allclose(np.mean(positions, axis=0), 9.5, atol=0.6)


def test_example_of_a_sample_does_not_depend_on_what_is_asked_with_it():
    numbers = np.arange(1000)
    together = order.example_indices(numbers, num_examples=7, seed=5)
    apart = [order.example_indices(numbers[i : i + 1], num_examples=7, seed=5) for i in numbers]
    np.testing.assert_array_equal(together, np.concatenate(apart))


def test_drawing_follows_the_frequencies_of_classes():
    labels = np.repeat([0, 1, 2, 4], [900, 90, 9, 1])  # of class 3 there is nothing
    for sampling, shares in [
        ("balanced", np.full(4, 1 / 4)),
        ("sqrt", np.sqrt([900, 90, 9, 1]) / np.sqrt([900, 90, 9, 1]).sum()),
    ]:
        weights = order.cumulative_weights(labels, sampling=sampling)
        drawn = order.sampled_indices(np.arange(20_000), cumulative_weights=weights, seed=0)
        counts = np.bincount(labels[drawn], minlength=5)[[0, 1, 2, 4]]
        assert scipy.stats.chisquare(counts, 20_000 * shares).pvalue > 0.01
        within = np.bincount(drawn, minlength=len(labels))[labels == 1]
        assert scipy.stats.chisquare(within).pvalue > 0.01


def test_draws_depend_on_seed_and_number_only():
    weights = order.cumulative_weights(np.repeat([0, 1], [50, 7]), sampling="sqrt")
    numbers = np.arange(300)

    def draw(numbers, seed=3):
        return order.sampled_indices(numbers, cumulative_weights=weights, seed=seed)

    np.testing.assert_array_equal(draw(numbers)[::-1], draw(numbers[::-1]))
    np.testing.assert_array_equal(draw(numbers)[250:], draw(numbers[250:]))
    assert (draw(numbers) != draw(numbers, seed=4)).mean() > 0.9


def test_order_stays_what_it_was():
    # Runs are continued across versions: these numbers may never change.
    indices = order.example_indices(np.arange(8), num_examples=8, seed=2**64 - 1)
    assert indices.tolist() == [0, 7, 4, 2, 6, 3, 1, 5]
    weights = order.cumulative_weights(np.repeat([0, 1], [6, 2]), sampling="sqrt")
    drawn = order.sampled_indices(np.arange(8), cumulative_weights=weights, seed=2**64 - 1)
    assert drawn.tolist() == [4, 2, 7, 6, 2, 6, 5, 6]
    assert order.sample_rng(1, 2).integers(2**32, size=2).tolist() == [2592942375, 2470896546]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_a_batch_in_blocks(process_count):
    rows = [
        order.sample_numbers(
            3, global_batch_size=8, process_index=process, process_count=process_count
        )
        for process in range(process_count)
    ]
    assert len({len(numbers) for numbers in rows}) == 1
    np.testing.assert_array_equal(np.concatenate(rows), 24 + np.arange(8))


@pytest.mark.parametrize(("batch_size", "process_count"), [(10, 4), (0, 1), (2, 4)])
def test_batches_that_cannot_be_shared_are_refused(batch_size, process_count):
    message = f"global batch of {batch_size} images is not divisible by {process_count} processes"
    with pytest.raises(UserError, match=message):
        order.sample_numbers(0, global_batch_size=batch_size, process_count=process_count)


def test_sample_generators_repeat_and_differ_from_each_other():
    draws = {order.sample_rng(seed, number).random() for seed in range(3) for number in range(100)}
    assert len(draws) == 300
    assert order.sample_rng(2, 99).random() in draws


def test_streams_of_one_seed_and_number_differ():
    streams = (order.SHUFFLE, order.AUGMENT, order.HOLD_OUT, order.TAKE, order.SAMPLE)
    bits = {int(order.bit_generator(0, 0, stream=stream).random_raw()) for stream in streams}
    assert len(bits) == len(streams)
