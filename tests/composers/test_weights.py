"""Weights that stay and weights that follow gradients or gaps: what must hold whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch

from align.composers.base import Observed, tensor
from align.composers.fixed import best, confidence, disagreement, drawn_degrees
from align.composers.gradient import bounded, cosines, influences, mirror_step
from tests.composers.parts import NAMES, option


def gradients(*rows):
    return tensor(rows)


def moved(composer, rows, lr=1e-6, max_norm=None, steps=1):
    """Weights after being told the influences of these gradients."""
    told = influences(rows @ rows.T, None, max_norm)
    for _ in range(steps):
        composer.update(Observed(influences=told, learning_rate=lr))
    return composer.weights


# --- gradients


def test_identical_gradients_keep_the_weights():
    start = {"helpful": 0.5, "brief": 0.3, "clear": 0.2}
    composer = option("gradient", weights=start)
    found = moved(composer, gradients([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]), steps=20)
    torch.testing.assert_close(found, tensor(list(start.values())), rtol=1e-12, atol=0)


def test_an_opposite_pair_has_no_influence():
    g = tensor([[3.0, -1.0], [-3.0, 1.0]])
    assert influences(g @ g.T, None, None).tolist() == [0.0, 0.0]
    assert moved(option("gradient", names=NAMES[:2]), g).tolist() == pytest.approx([0.5, 0.5])


def test_what_opposes_the_others_loses_and_the_larger_norm_gains():
    found = moved(option("gradient"), gradients([1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]))
    assert found[2] < found[0]
    assert found[2] < found[1]
    found = moved(option("gradient", names=NAMES[:2]), gradients([2.0, 0.0], [0.0, 1.0]))
    assert found[0] > found[1]
    # clipped to one norm they are alike
    found = moved(option("gradient", names=NAMES[:2]), gradients([2.0, 0.0], [0.0, 5.0]), max_norm=1.0)
    assert found.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_by_hand():
    """g = (1, 0), (1, 1): Gram [[1, 1], [1, 2]], influences 2 and 3; factor 1e-6 / 1e-5 = 0.1; log-odds 0.1."""
    composer = option("gradient", names=NAMES[:2])
    w = moved(composer, gradients([1.0, 0.0], [1.0, 1.0]))
    assert float((w[1] / w[0]).log()) == pytest.approx(0.1, rel=1e-12)
    assert composer.metrics()["influence/brief"] == pytest.approx(3.0)


def test_the_log_weights_move_by_at_most_a_tenth_of_k_a_step():
    """Norms of at most 1 make |I| <= K; the step is 0.1 I, and the softmax takes one number off all."""
    rows = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9
    composer = option("gradient")
    before = composer.weights.log()
    after = moved(composer, rows, max_norm=1.0).log()
    assert float((after - before).abs().max()) <= 2 * 0.1 * 3


def test_order_of_objectives_permutes_the_weights():
    rows = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = moved(option("gradient"), rows, steps=3)
    here = moved(option("gradient", names=NAMES[::-1]), rows.flip(0), steps=3)
    torch.testing.assert_close(there, here.flip(0), rtol=1e-12, atol=1e-15)


def test_accumulated_influences_are_averaged_before_a_step():
    rows = [torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    composer = option("gradient", accumulate=2)
    start = composer.weights
    assert torch.equal(moved(composer, rows[0]), start)
    told = [influences(r @ r.T, None, None) for r in rows]
    expected = mirror_step(start, (told[0] + told[1]) / 2, 0.1)
    torch.testing.assert_close(moved(composer, rows[1]), expected, rtol=1e-12, atol=0)


def test_weights_within_bounds_sum_to_1_and_keep_proportions():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        raw = torch.softmax(3 * torch.randn(4, dtype=torch.float64, generator=generator), 0)
        found = bounded(raw, 0.1, 0.5)
        assert float(found.sum()) == pytest.approx(1, abs=1e-12)
        assert float(found.min()) >= 0.1 - 1e-12
        assert float(found.max()) <= 0.5 + 1e-12
        free = (found > 0.1 + 1e-9) & (found < 0.5 - 1e-9)
        ratios = (found / raw)[free]
        torch.testing.assert_close(ratios, ratios[:1].expand(len(ratios)), rtol=1e-9, atol=0)
    composer = option("gradient", min_weight=0.2, max_weight=0.6)
    assert moved(composer, gradients([5.0], [0.1], [0.1]), steps=50).tolist() == pytest.approx([0.6, 0.2, 0.2])


def test_cosines_by_hand():
    g = tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(cosines(g @ g.T), tensor([[1, half, 0], [half, 1, 0], [0, 0, 0]]))


# --- gaps


def test_plain_follows_the_largest_gap_and_smooth_goes_to_it():
    ideal = {"helpful": 1.0, "brief": 1.0, "clear": 1.0}
    means = tensor([0.9, 0.4, 0.6])
    plain = option("tchebycheff", ideal=ideal, decay=0.0)
    plain.update(Observed(means=means))
    assert plain.metrics()["weight/brief"] == 1
    sharp, even = (option("tchebycheff_smooth", ideal=ideal, decay=0.0, mu=mu) for mu in (1e-4, 1e4))
    for composer in (sharp, even):
        composer.update(Observed(means=means))
    assert sharp.metrics()["weight/brief"] == pytest.approx(1)
    assert even.metrics()["weight/brief"] == pytest.approx(1 / 3, rel=1e-3)


def test_mirror_gains_step_by_step_and_running_ideal_only_rises():
    composer = option("tchebycheff", form="mirror", eta=1.0)
    best_so_far, shares = [], []
    for step in range(6):
        composer.update(Observed(means=tensor([0.5 + 0.05 * step, 0.2, 0.6 - 0.05 * step])))
        best_so_far.append(composer.ideal)
        shares.append(composer.metrics()["multiplier/clear"])
    assert (torch.stack(best_so_far).diff(dim=0) >= 0).all()
    assert (tensor(shares).diff() > 0)[1:].all()


# --- weights that stay


def test_fixed_by_hand_whitened_and_not():
    streams = tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 20.0]])
    weights = {"helpful": 0.25, "brief": -0.75}
    plain = option("fixed", names=NAMES[:2], weights=weights, normalise="none")
    assert plain(streams).tolist() == [0.25 - 7.5, 0.75 - 22.5, 1.25 - 15.0]
    white = option("fixed", names=NAMES[:2], weights=weights)
    # means 3 and 20, standard deviations 2 and 10
    assert white(streams).tolist() == pytest.approx([-0.25 + 0.75, 0 - 0.75, 0.25 - 0], abs=1e-8)


def test_what_has_no_number_stays_without_one():
    """Rewards: NaN where a component that counts is NaN; whitening is over the others."""
    composer = option("fixed", weights={"helpful": 0.5, "brief": 0.5, "clear": 0.0}, normalise="none")
    found = composer(tensor([[1.0, math.nan, 1.0], [1.0, 2.0, math.nan]]))
    assert math.isnan(found[0])
    assert found[1] == 1.5


def test_disagreement_and_confidence():
    assert disagreement(["4", "4", "5", None]) == ("4", 0.5)
    assert disagreement([None, None]) == (None, 1.0)
    assert disagreement(["a", "b"]) == ("a", 0.5)
    found = confidence(tensor([0.0, 0.1, 0.5]), scale=0.5, floor=0.1)
    assert found.tolist() == pytest.approx([math.exp(-0.2), math.exp(-0.2), math.exp(-1)])


def test_best_of_a_direction():
    rewards = tensor([[[1.0, 0.0], [0.0, 1.0], [math.nan, 9.0]], [[math.nan, 0.0]] * 3])
    assert best(rewards, tensor([[0.6, 0.8], [1.0, 0.0]])).tolist() == [1, -1]
    degrees = drawn_degrees(100, -45, 0, 3)
    assert ((degrees >= -45) & (degrees < 0)).all()
    assert torch.equal(degrees, drawn_degrees(100, -45, 0, 3))
