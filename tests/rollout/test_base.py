"""Sampling, completions and seeds."""

from __future__ import annotations

import pytest

from align.rollout.base import Completion, Sampling, seed_of


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_impossible_sampling(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**({"max_new_tokens": 1} | bad))


def test_only_length_is_unfinished():
    assert [Completion((1,), stop).finished for stop in ("end", "string", "length")] == [True, True, False]


def test_seeds_are_distinct_and_stay():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    seeds = {seed_of(s, *k) for s in (0, 1) for k in keys if k}
    assert len(seeds) == 2 * (len(keys) - 1)
    assert all(0 <= s < 2**63 for s in seeds)
    # what a collection drew must be drawn again by a later version: SeedSequence promises its stream
    assert seed_of(0, 1, 2) == 3204139011170283785
    assert Sampling(8, seed=0).at(1, 2).seed == seed_of(0, 1, 2)
    assert Sampling(8, temperature=0.5, top_k=3).at(1).top_k == 3
