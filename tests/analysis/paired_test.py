"""The statistics of comparisons, against scipy and numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from vitcls.analysis import classification, paired
from vitcls.analysis.paired import Sample


def sampled(values: np.ndarray, *, num: int = 300) -> Sample:
    """Of per-image values (S, N)."""
    weights = np.concatenate(list(classification.resamples(values.shape[1], num, seed=0)))
    return Sample(values.mean(1), weights @ values.T / values.shape[1])


def constant(values) -> Sample:
    """Of runs that are the same on every image: only seeds vary."""
    return sampled(np.repeat(np.array(values, np.float64)[:, None], 9, axis=1))


def test_mcnemar_is_the_binomial_test_of_the_images_that_one_alone_gets_right():
    a = np.repeat([True, True, False, False], [50, 10, 2, 7])
    b = np.repeat([True, False, True, False], [50, 10, 2, 7])
    by_hand = 2 * (1 + 12 + 66) / 2**12  # 0, 1 or 2 of 12, and as many on the other side
    assert paired.mcnemar(a, b) == pytest.approx(by_hand)
    assert paired.mcnemar(b, a) == pytest.approx(stats.binomtest(10, 12).pvalue)
    assert paired.mcnemar(a, a) == 1


def test_holm_by_hand():
    # 0.01 x 4, 0.015 x 3, 0.04 x 2, then 0.03 x 1, which must not be below the one before
    assert paired.holm([0.04, 0.01, 0.9, 0.015]) == pytest.approx([0.08, 0.04, 0.9, 0.045])
    assert paired.holm([0.02, 0.02, 0.021]) == pytest.approx([0.06, 0.06, 0.06])
    assert paired.holm([0.7, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_the_interval_over_seeds_is_students():
    values = np.array([0.91, 0.93, 0.90, 0.95])
    mean, spread, low, high = paired.over_seeds(values)
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (mean, spread) == pytest.approx((values.mean(), stats.tstd(values)))
    assert (low, high) == pytest.approx(expected)


def test_one_seed_has_no_interval():
    mean, *rest = paired.over_seeds(np.array([0.5]))
    assert mean == 0.5 and all(map(math.isnan, rest))


def test_of_seeds_alone_it_is_the_paired_t_test():
    a, b = [0.91, 0.95, 0.92, 0.94], [0.90, 0.91, 0.90, 0.92]
    found = paired.difference(constant(a), constant(b), same_seeds=True)
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_of_other_seeds_it_is_welchs_test():
    a, b = [0.91, 0.97, 0.92, 0.94, 0.90], [0.90, 0.91, 0.905]
    found = paired.difference(constant(a), constant(b), same_seeds=False)
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_of_one_seed_each_it_is_the_bootstrap_over_images():
    rng = np.random.default_rng(0)
    a, b = (rng.random((1, 400)) < np.array([[0.9], [0.85]])[[i]][0] for i in (0, 1))
    found = paired.difference(sampled(a * 1.0, num=2000), sampled(b * 1.0, num=2000),
                              same_seeds=True)  # fmt: skip
    values = a[0] * 1.0 - b[0]
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=1
    ).confidence_interval  # of the paired differences
    assert not found.seeds
    assert found.interval() == pytest.approx(tuple(expected), abs=0.005)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)


@pytest.mark.parametrize("same_seeds", [True, False])
@pytest.mark.parametrize("by_seed", [0.0, 0.05])
def test_intervals_hold_the_truth_in_about_95_of_100_experiments(by_seed, same_seeds):
    """Runs that are drawn anew with new images each time; the true difference is 0."""
    rng = np.random.default_rng(1)
    num, held = 250, 0
    for _ in range(num):
        image = rng.normal(size=200)
        groups = [
            image + by_image + by_seed * rng.normal(size=(3, 1)) + 0.8 * rng.normal(size=(3, 200))
            for by_image in 0.5 * rng.normal(size=(2, 200))
        ]
        a, b = (sampled(group, num=100) for group in groups)
        low, high = paired.difference(a, b, same_seeds=same_seeds).interval()
        held += low <= 0 <= high
    assert 0.93 <= held / num <= 1


def test_groups_that_are_the_same_differ_by_nothing():
    one = sampled(np.ones((3, 20)))
    found = paired.difference(one, one, same_seeds=True)
    assert (found.value, found.p, found.variance()) == (0, 1, 0)
    assert found.interval() == (0, 0)
    assert paired.seeds_needed(found, num_tests=1) is None


def test_a_single_image_proves_nothing():
    found = paired.difference(
        sampled(np.ones((1, 1))), sampled(np.zeros((1, 1))), same_seeds=True
    )  # fmt: skip
    assert (found.value, found.p) == (1, 1)


def test_as_many_seeds_as_are_needed_find_the_difference_in_80_of_100_experiments():
    by_seed = 0.02**2
    found = paired.Difference(0.012, 0.0, ((by_seed, 3),), 0.4)
    more = paired.seeds_needed(found, num_tests=1)

    def power(num: int) -> float:  # of the paired t test, from its non-central distribution
        t, shift = stats.t.ppf(0.975, num - 1), 0.012 / math.sqrt(by_seed / num)
        return stats.nct.sf(t, num - 1, shift)

    assert power(3 + more) == pytest.approx(0.8, abs=0.03)
    assert power(3 + more // 2) < 0.7


def test_corrections_need_more_seeds_and_large_differences_fewer():
    one = paired.Difference(0.012, 0.0, ((4e-4, 3),), 0.4)
    more = paired.seeds_needed(one, num_tests=1)
    assert paired.seeds_needed(one, num_tests=10) > more
    larger = paired.Difference(0.02, 0.0, ((4e-4, 3),), 0.4)
    assert paired.seeds_needed(larger, num_tests=1) < more
    tiny = paired.Difference(1e-5, 0.0, ((4e-4, 3),), 0.4)
    assert paired.seeds_needed(tiny, num_tests=1) == paired.MAX_SEEDS


def test_where_images_are_too_few_no_seeds_are_enough():
    found = paired.Difference(0.01, 0.006**2, ((1e-6, 3),), 0.1)
    assert paired.seeds_needed(found, num_tests=1) is None
    images = paired.images_needed(found, 1000, num_tests=1)
    assert images == math.ceil(1000 * (0.6 * (1.959964 + 0.841621)) ** 2)
