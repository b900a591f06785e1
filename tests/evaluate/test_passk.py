"""pass@k and mean rewards, counted by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from align.evaluate.passk import bootstrap, mean_reward_interval, pass_at_k, pass_at_k_interval


@pytest.mark.parametrize(
    "right, samples, k, expected",
    [
        (1, 4, 1, 1 / 4),
        (1, 4, 2, 1 / 2),  # of the 6 pairs of 4 samples, 3 hold the right one
        (2, 4, 2, 5 / 6),  # of the 6 pairs, only the one of both wrong ones fails
        (2, 5, 3, 9 / 10),  # of the 10 triples, only that of the three wrong ones fails
        (0, 5, 5, 0.0),
        (5, 5, 1, 1.0),
        (3, 5, 3, 1.0),  # two wrong ones: any three hold a right one
        (1, 5, 5, 1.0),
    ],
)
def test_by_hand(right, samples, k, expected):
    assert pass_at_k(right, samples, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_equals_the_share_of_subsets_with_a_right_sample(right, k):
    samples = [True] * right + [False] * (6 - right)
    subsets = list(combinations(samples, k))
    assert pass_at_k(right, 6, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_is_unbiased_where_the_plain_estimate_is_not():
    """Samples are right with probability 0.3. The expectation over 0..10 right of 10 is 1 - 0.7**4 exactly; plugging
    the share of right ones in, 1 - (1 - c/n)**4, falls short."""
    weight = [math.comb(10, c) * 0.3**c * 0.7 ** (10 - c) for c in range(11)]
    expected = sum(w * pass_at_k(c, 10, 4) for c, w in enumerate(weight))
    assert expected == pytest.approx(1 - 0.7**4, abs=1e-14)
    plain = sum(w * (1 - (1 - c / 10) ** 4) for c, w in enumerate(weight))
    assert plain < expected - 0.03


def test_large_numbers_do_not_overflow():
    """C(10000, 5000) has 3009 digits; of one right one, half of the subsets of half the samples hold it."""
    assert pass_at_k(1, 10_000, 5_000) == 0.5


@pytest.mark.parametrize("right, samples, k", [(0, 4, 0), (0, 4, 5), (5, 4, 1), (-1, 4, 1), (0, 0, 1)])
def test_impossible_numbers(right, samples, k):
    with pytest.raises(ValueError, match="must be from"):
        pass_at_k(right, samples, k)


def test_the_mean_is_over_prompts():
    """pass@2 of the prompts: 1/2 (1 right of 4), 1 (2 of 2), 0: mean 1/2."""
    right = [[True, False, False, False], [True, True], [False, False, False]]
    found = pass_at_k_interval(right, 2)
    assert found.mean == pytest.approx(0.5, abs=1e-15)
    assert (found.low, found.high) == (0.0, 1.0)  # 3 prompts: 1 of 27 resamplings is all 0, 1 of 27 all 1
    with pytest.raises(ValueError, match="pass@3 of 2 samples"):
        pass_at_k_interval(right, 3)


def test_missing_rewards_are_not_zero():
    """Prompt means 2 (of 1 and 3), 4 (the other is missing), none: mean 3, between 2 and 4."""
    found = mean_reward_interval([[1.0, 3.0], [4.0, None], [None, math.nan]])
    assert (found.mean, found.low, found.high) == (3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no prompt has a reward"):
        mean_reward_interval([[None], [math.nan]])


def test_the_interval_is_that_of_a_binomial():
    """400 prompts, 40 % right: the exact standard error is sqrt(0.24 / 400) = 0.0245, the interval 1.96 of it each
    way; a multiple of 1/400, with the noise of 10 000 resamplings, it is met to 0.004."""
    found = bootstrap([1.0] * 160 + [0.0] * 240)
    assert found.mean == pytest.approx(0.4, abs=1e-12)
    assert found.low == pytest.approx(0.4 - 1.96 * math.sqrt(0.24 / 400), abs=0.004)
    assert found.high == pytest.approx(0.4 + 1.96 * math.sqrt(0.24 / 400), abs=0.004)
    assert found == bootstrap([1.0] * 160 + [0.0] * 240)
    assert found != bootstrap([1.0] * 160 + [0.0] * 240, seed=1)


def test_intervals_shift_and_scale_with_the_values():
    values = np.random.default_rng(0).normal(size=30)
    plain, moved = bootstrap(values), bootstrap(3 * values + 2)
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(3 * getattr(plain, name) + 2, abs=1e-12)
    assert bootstrap([0.7]).low == bootstrap([0.7]).high == 0.7
