"""Multipliers, mixing and the search for thresholds: what must hold whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from align.composers.base import KL, Observed, tensor
from align.composers.multipliers import GradientMultipliers, LogMultipliers, PIDMultipliers
from align.composers.search import drawn_simplex
from tests.composers.parts import NAMES, observed, option

RULES = {
    "sigmoid": GradientMultipliers("sigmoid", 0.1, 0.1, 0.5, 0.0),
    "tanh": GradientMultipliers("tanh", 0.1, 0.1, 0.5, 0.0),
    "softplus": GradientMultipliers("softplus", 0.1, 0.1, 0.5, 0.0),
    "none": GradientMultipliers("none", 0.1, 0.1, 0.5, 0.5),
    "log": LogMultipliers(1.0, 1e6, 0.1, 3, 2),
    "pid": PIDMultipliers(0.5, 0.1, 0.3, 0.0),
}


def path_of(rule, violations):
    state, out = rule.start(len(violations[0])), []
    for violation in violations:
        state = rule.step(state, tensor(violation))
        out.append(rule.multipliers(state))
    return torch.stack(out)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_constant_violation_makes_its_multiplier_rise_and_no_other_sign_does(rule):
    found = path_of(rule, [[0.2, -0.2]] * 40)
    steps = found.diff(dim=0)
    assert (steps[3:, 0] > 0).all()
    assert (steps[:, 1] <= 0).all()
    if rule.bounded:
        assert found.abs().max() < 1
    if not rule.signed:
        assert found.min() >= 0


def test_tanh_goes_below_0_where_a_mean_is_above_its_threshold():
    assert path_of(RULES["tanh"], [[-0.2]] * 5)[-1] < 0


def test_a_delay_waits_and_a_window_averages():
    """Window 2, delay 1: nothing, then z = 0.1 (1 + 3) / 2, then 0.1 (3 + 5) / 2 e^z more."""
    found = path_of(LogMultipliers(1.0, 1e6, 0.1, 2, 1), [[1.0], [3.0], [5.0]]).log()[:, 0]
    second = 0.1 * 2.0
    assert found.tolist() == pytest.approx([0.0, second, second + 0.1 * 4.0 * math.exp(second)], rel=1e-12)


def test_pid_by_hand():
    """v = 1, 2, -1: sums 1, 3, 2; rises 0, 1, 0. 0.5 + 0.1; 1 + 0.3 + 0.3; -0.5 + 0.2 -> 0."""
    found = path_of(RULES["pid"], [[1.0], [2.0], [-1.0]])[:, 0]
    assert found.tolist() == pytest.approx([0.6, 1.6, 0.0], rel=1e-12)


def test_slopes_are_those_of_autograd():
    for squash in ("sigmoid", "tanh", "softplus"):
        rule = GradientMultipliers(squash, 1.0, 0.0, 1e9, 0.7)
        raw = tensor([0.7, 0.7]).requires_grad_()
        f = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softplus": torch.nn.functional.softplus}[squash]
        (-f(raw) * tensor([0.3, -0.1])).sum().backward()
        stepped = rule.step(rule.start(2), tensor([0.3, -0.1]))
        torch.testing.assert_close(tensor(stepped["raw"]), 0.7 - raw.grad, rtol=1e-12, atol=0)


def test_weights_of_the_complement_sum_to_the_number_of_constraints():
    composer = option("lagrangian_mu")
    for step in range(5):
        composer.update(observed(step))
        assert float(composer.weights.sum()) == pytest.approx(3, rel=1e-12)
    composer = option("lagrangian_softplus")
    composer.update(observed(0))
    assert float(composer.weights.abs().sum()) == pytest.approx(1, rel=1e-12)


def test_a_mean_below_its_threshold_pulls_its_stream_up_and_at_most_pushes_down():
    for relation, sign in (("at_least", 1), ("at_most", -1)):
        composer = option("lagrangian_softplus", relation=relation)
        before = composer.weights
        means = tensor([0.4 - sign * 0.2, 0.5, 0.3])
        for _ in range(5):
            composer.update(Observed(means=means))
        assert composer.metrics()["violation/helpful"] == pytest.approx(0.2)
        assert sign * float(composer.weights[0]) > sign * float(before[0])


def test_the_unit_of_a_stream_is_whitened_away_and_equal_values_are_0():
    composer = option("lagrangian_mu")
    streams = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = streams * tensor([1.0, 100.0, 1.0, 0.1]) + 7
    torch.testing.assert_close(composer(streams), composer(scaled), rtol=1e-6, atol=1e-6)  # epsilon 1e-8
    streams[:, :3] = 0.1 + 0.2
    lonely = composer(streams)
    streams[:, :3] = 5.0
    assert torch.equal(composer(streams), lonely)


def test_order_of_components_does_not_matter():
    there, here = option("lagrangian_mu"), option("lagrangian_mu", names=NAMES[::-1])
    streams = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        o = observed(step)
        there.update(Observed(means=o.means))
        here.update(Observed(means=o.means.flip(0)))
    torch.testing.assert_close(there(streams), here(streams[:, [2, 1, 0, 3]]), rtol=1e-12, atol=1e-12)


def test_the_kl_is_a_stream_only_where_it_is_maximised():
    mu, log = option("lagrangian_mu"), option("lagrangian_log")
    assert mu.streams == (*NAMES, KL)
    assert mu.penalty_signs == (0.0, 0.0, 0.0, 1.0)
    assert log.streams == NAMES
    # the penalty in each stream, with its sign, so that the mix holds it once
    assert log.penalty_signs == (1.0, -1.0, -1.0)
    assert float(log.weights @ tensor(log.penalty_signs)) == pytest.approx(1.0)


def test_thresholds_may_change_at_a_resume_but_not_those_that_are_searched_for():
    old = option("lagrangian_mu")
    old.update(observed(0))
    new = option("lagrangian_mu", thresholds={"helpful": 0.9})
    new.load_state_dict(old.state_dict())
    assert new.thresholds["helpful"] == 0.9
    assert new.metrics()["multiplier/helpful"] == old.metrics()["multiplier/helpful"]


# --- the search ---


# without the cache, whose tolerance ends the search at about its own size
FINE = {"spread": 1e-6, "cache_tolerance": 0.0}


def gold_of(thresholds):
    """Best at 0.3, 0.6, 0.2."""
    return 1 - sum((t - c) ** 2 for t, c in zip(thresholds, (0.3, 0.6, 0.2), strict=True))


def searched(composer, updates):
    for _ in range(updates):
        composer.update(Observed(means=tensor([0.0, 0.0, 0.0])))
        if composer.due:
            composer.update(Observed(gold=gold_of(composer.thresholds.values())))
    return composer


def test_search_finds_better_thresholds_than_it_drew_and_keeps_the_best():
    composer = searched(option("lagrangian_search", search={"max_points": 60, "seed": 1, "method": FINE}), 200)
    drawn = drawn_simplex([0.2, 0.3, 0.1], [0.6, 0.7, 0.5], 1)
    found = composer.metrics()
    assert found["search/finished"] == 1
    assert found["search/best_score"] == gold_of(composer.thresholds.values()) >= max(map(gold_of, drawn))
    assert 1 - found["search/best_score"] < 0.01 * min(1 - gold_of(p) for p in drawn)
    assert [composer.thresholds[n] for n in NAMES] == [found[f"search/best_{n}"] for n in NAMES]
    assert not composer.due


def test_a_point_is_measured_after_its_steps_or_once_the_means_are_near():
    composer = option("lagrangian_search", search={"steps": 7, "check_every": 2})
    far, waited = tensor([0.0, 0.0, 0.0]), 0
    while not composer.due:
        composer.update(Observed(means=far))
        waited += 1
    assert waited == 7
    composer.update(Observed(gold=0.5))
    near = tensor([composer.thresholds[n] * 1.049 for n in NAMES])
    composer.update(Observed(means=near))
    assert not composer.due
    composer.update(Observed(means=near))
    assert composer.due


def test_a_measurement_that_nobody_waits_for_does_not_move_the_search():
    composer = option("lagrangian_search")
    before = composer.state_dict()
    composer.update(Observed(gold=0.9))
    assert composer.state_dict() == before


def test_max_points_ends_the_search():
    composer = searched(option("lagrangian_search", search={"max_points": 5, "method": {"spread": 0.0}}), 50)
    assert composer.metrics()["search/points"] == 5
    assert composer.metrics()["search/finished"] == 1
