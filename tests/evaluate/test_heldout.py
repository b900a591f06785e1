"""Metrics of held-out completions against values by hand."""

from __future__ import annotations

import pytest

from align.evaluate.heldout import changes, heldout_metrics


def done(a: float | None, b: float | None) -> dict:
    return {"rewards": {"a": a, "b": b}, "score": None if a is None or b is None else a + b}


def test_means_are_over_what_is_known():
    greedy = [done(1.0, 0.5), done(0.0, None), done(None, 0.7)]
    drawn = [[done(1.0, 0.0), done(0.0, 0.0)], [done(1.0, 1.0), done(1.0, None)], [done(None, 0.5), done(0.0, 0.5)]]
    found = heldout_metrics(greedy, drawn, ("a", "b"), None)
    assert found["heldout/a_greedy"] == 0.5
    assert found["heldout/b_greedy"] == pytest.approx(0.6)
    assert found["heldout/total_greedy"] == 1.5
    assert found["heldout/a"] == pytest.approx(3 / 5)
    assert found["heldout/b"] == pytest.approx(2 / 5)
    # right by a: 1 of 2, 2 of 2, 0 of 2; one of two samples is right in 1/2, 1, 0 of the prompts' draws
    assert found["heldout/pass@1"] == pytest.approx(0.5)
    assert found["heldout/pass@2"] == pytest.approx(2 / 3)
    assert found["heldout/pass@1_low"] <= 0.5 <= found["heldout/pass@1_high"]


def test_pass_component_and_no_drawn_ones():
    one = [done(0.0, 1.0)]
    assert heldout_metrics(one, [[done(0.0, 1.0)]], ("a", "b"), "b")["heldout/pass@1"] == 1.0
    assert heldout_metrics(one, [[done(0.0, 1.0)]], ("a", "b"), None)["heldout/pass@1"] == 0.0
    assert not any("pass" in name for name in heldout_metrics(one, [[]], ("a", "b"), None))


def test_change_is_of_the_prompts_known_twice():
    found = changes([done(0.0, 1.0), done(None, 0.0)], [done(1.0, 1.0), done(1.0, 0.5)], ("a", "b"))
    assert (found["a"]["count"], found["a"]["before"], found["a"]["after"]) == (1, 0.0, 1.0)
    assert found["b"]["change"]["mean"] == 0.25
    assert found["total"]["count"] == 1
    assert "total" not in changes([done(0.0, 1.0)], [done(0.0, 1.0)], ("a",))
