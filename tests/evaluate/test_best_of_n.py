"""Best-of-n counted by hand, over all subsets, against the reference vectors and in whole numbers."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from align.evaluate.best_of_n import best_of_n, kl_bound, powers_of_two, rank_weights, select

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "reward_public.json").read_text())
ENTRIES = [e for e in VECTORS if e["algorithm"] == "bon_unbiased"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_vectors(entry):
    inputs, wanted = entry["inputs"], entry["expected"]["per_n"]
    found = best_of_n(inputs["proxy_scores"], inputs["gold_scores"], entry["config"]["ns"])
    assert found.n.tolist() == [w["n"] for w in wanted]
    for values, name in ((found.gold, "gold_score"), (found.proxy, "proxy_score"), (found.kl, "kl")):
        np.testing.assert_allclose(values, [w[name] for w in wanted], rtol=0, atol=1e-9)


def test_there_are_vectors():
    assert len(ENTRIES) >= 2


def test_by_hand():
    """Four completions, two drawn: of the 6 pairs the second lowest is the best of 1, the next of 2, the highest of
    3. Gold by ascending proxy 10, 20, 60, 0: (20 + 2 * 60 + 3 * 0) / 6."""
    assert rank_weights(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    found = best_of_n([[3.0, 1.0, 4.0, 2.0]], [[60.0, 10.0, 0.0, 20.0]], [2])
    assert found.gold.tolist() == pytest.approx([140 / 6])
    assert found.proxy.tolist() == pytest.approx([(2 + 2 * 3 + 3 * 4) / 6])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", range(1, 8))
def test_equals_the_mean_over_all_subsets(rng, ties, n):
    proxy = rng.integers(0, 3, 7).astype(float) if ties else rng.normal(size=7)
    gold = rng.normal(size=7)
    total = []
    for subset in combinations(range(7), n):
        best = max(proxy[list(subset)])
        total.append(np.mean([gold[i] for i in subset if proxy[i] == best]))
    found = best_of_n([proxy], [gold], [n])
    assert found.gold[0] == pytest.approx(np.mean(total), abs=1e-12)
    assert found.proxy[0] == pytest.approx(np.mean([max(proxy[list(s)]) for s in combinations(range(7), n)]), abs=1e-12)


def test_one_is_the_mean_and_all_is_the_best(rng):
    proxy, gold = rng.normal(size=(3, 50)), rng.normal(size=(3, 50))
    found = best_of_n(proxy, gold, [1, 50])
    np.testing.assert_allclose(found.gold_by_prompt[:, 0], gold.mean(1), atol=1e-12)
    np.testing.assert_allclose(found.gold_by_prompt[:, 1], gold[np.arange(3), proxy.argmax(1)], atol=1e-12)
    np.testing.assert_allclose(found.gold, found.gold_by_prompt.mean(0), atol=1e-12)


def test_the_order_of_completions_changes_nothing(rng):
    proxy, gold = rng.integers(0, 5, 60).astype(float), rng.normal(size=60)  # many ties
    order = rng.permutation(60)
    ns = [1, 2, 7, 30, 60]
    before, after = best_of_n([proxy], [gold], ns), best_of_n([proxy[order]], [gold[order]], ns)
    np.testing.assert_allclose(after.gold, before.gold, rtol=0, atol=1e-12)
    # neither does a rising function of the proxy
    np.testing.assert_allclose(best_of_n([np.exp(proxy)], [gold], ns).gold, before.gold, rtol=0, atol=1e-12)


def test_the_proxy_rises_and_a_proxy_that_knows_nothing_gains_nothing(rng):
    proxy, gold = rng.normal(size=300), rng.normal(size=300)
    ns = powers_of_two(300)
    found = best_of_n([proxy], [gold], ns)
    assert (np.diff(found.proxy) > 0).all()
    constant = best_of_n([np.zeros(300)], [gold], ns)
    np.testing.assert_allclose(constant.gold, gold.mean(), atol=1e-12)


def test_prompts_may_have_different_numbers_of_completions():
    found = best_of_n([[1.0, 2.0], [1.0, 2.0, 3.0]], [[0.0, 1.0], [0.0, 3.0, 6.0]], [1, 2])
    # best of 2: 1; of the three pairs (3 + 6 + 6) / 3
    assert found.gold_by_prompt.tolist() == pytest.approx(np.array([[0.5, 1.0], [3.0, 5.0]]))


@pytest.mark.parametrize("n", [1, 2, 100, 6_300, 12_500, 12_600])
def test_the_papers_size_does_not_overflow(n):
    """The estimator in whole numbers of thousands of digits at N = 12 600."""
    weights = rank_weights(12_600, n)
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1, abs=1e-10)
    everything = math.comb(12_600, n)
    for i in (12_600, 12_599, 12_000, max(n, 11_000)):
        exact = float(Fraction(math.comb(i - 1, n - 1), everything))
        assert weights[i - 1] == pytest.approx(exact, rel=1e-10, abs=1e-300)
    # gold that is its own rank: the expected highest rank of n is n (N + 1) / (n + 1)
    ranks = np.arange(1.0, 12_601.0)
    assert best_of_n([ranks], [ranks], [n]).gold[0] == pytest.approx(n * 12_601 / (n + 1), rel=1e-10)


def test_kl():
    """A uniform proxy's best of n has density n u^(n-1): its KL to the uniform one, by numerical integration."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 5):
        density = n * u ** (n - 1)
        assert float(kl_bound(n)) == pytest.approx(np.mean(density * np.log(density)), abs=1e-6)


def test_select_takes_the_lowest_place_among_equal_scores():
    assert select([0.0, 2.0, 1.0, 2.0]) == 1
    assert select([np.nan, -5.0, np.nan, -5.0]) == 1
    with pytest.raises(ValueError, match="no completion has a score"):
        select([np.nan, np.nan])


def test_bad_input():
    with pytest.raises(ValueError, match="best of 4 among 3 completions: n must be from 1"):
        best_of_n([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], [4])
    with pytest.raises(ValueError, match="best of 0 among 3"):
        rank_weights(3, 0)
    with pytest.raises(ValueError, match="prompt 1: every completion needs a finite proxy and a finite gold"):
        best_of_n([[1.0], [np.nan]], [[1.0], [1.0]], [1])
    with pytest.raises(ValueError, match="prompt 0: every completion needs"):
        best_of_n([[1.0, 2.0]], [[1.0]], [1])
    with pytest.raises(ValueError, match="at least one prompt"):
        best_of_n([], [], [1])


def test_powers_of_two():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(12_600)[-1] == 8192
