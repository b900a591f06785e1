"""MCTS-DPO and MAPL: pairs that carry numbers of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from align.objectives.losses import Sigmoid
from align.objectives.mapl import MAPL
from align.objectives.tree import MCTSDPO
from align.prepare.search import label_smoothing
from tests.conftest import plain_dpo
from tests.objectives.build import rows_of, stats_of

NAN = math.nan


def pairs(values, **numbers):
    """Policy, a reference of zeros and the batch; numbers: [P] each."""
    policy, batch = rows_of(values, numbers={n: torch.tensor(v) for n, v in numbers.items()})
    return policy, stats_of(torch.zeros_like(policy.token_logps), batch), batch


def softplus(x):
    return math.log(1 + math.exp(x))


def test_smoothing_is_that_of_each_pair():
    # z = 0.5 (-1 + 3) = 1 for both pairs, e = 0 and 1/4
    policy, reference, batch = pairs([[-1.0], [-1.0], [-3.0], [-3.0]], label_smoothing=[0.0, 0.25])
    losses = MCTSDPO(0.5, 0.0, True)(policy, reference, batch).terms[0].losses
    assert losses.tolist() == pytest.approx([softplus(-1), 0.75 * softplus(-1) + 0.25 * softplus(1)], abs=1e-14)
    certain = MCTSDPO(0.5, 0.0, False)(policy, reference, batch).terms[0].losses
    assert torch.equal(certain, plain_dpo(0.5, Sigmoid(0.0))(policy, reference, batch).terms[0].losses)


def test_length_penalty():
    # -4 over 4 tokens, -3 over 1: sums differ by -1, with p = 1/2 by -2 + 3, with p = 1 by -1 + 3
    policy, reference, batch = pairs([[-1.0] * 4, [-3.0]])
    for p, z in ((0.0, -1.0), (0.5, 1.0), (1.0, 2.0)):
        loss = MCTSDPO(1.0, p, False)(policy, reference, batch).terms[0].losses.item()
        assert loss == pytest.approx(softplus(-z), abs=1e-14)


def test_a_row_without_smoothing_is_named():
    values = [[-1.0], [-1.0], [-3.0], [-3.0]]
    for batch in (pairs(values), pairs(values, label_smoothing=[NAN, NAN])):
        with pytest.raises(ValueError, match='file:1: objective.conservative=true needs .*"label_smoothing"'):
            MCTSDPO(0.5, 0.0, True)(*batch)
    with pytest.raises(ValueError, match="file:2: "):
        MCTSDPO(0.5, 0.0, True)(*pairs(values, label_smoothing=[0.1, NAN]))


def test_visits_to_smoothing():
    # as often visited, or more often the worse: nothing is known
    assert label_smoothing(4, 4) == label_smoothing(1, 9) == 0.5
    assert label_smoothing(9, 3) == pytest.approx(0.25)
    assert label_smoothing(9, 0) == 0.0


def test_mapl_by_hand():
    # z = 0.5 * 2 = 1 for the three pairs; the inter-sample one has a margin of 0.2 times a gap of 3
    values = [[-1.0]] * 3 + [[-3.0]] * 3
    policy, reference, batch = pairs(values, mapl_kind=[0.0, 1.0, 2.0], satisfied_gap=[NAN, NAN, 3.0])
    out = MAPL(0.5, 0.7, 0.3, 0.2)(policy, reference, batch)
    expected = [softplus(-1), 0.7 * softplus(-1), 0.3 * softplus(-0.4)]
    assert out.terms[0].losses.tolist() == pytest.approx(expected, abs=1e-7)
    out.terms[0].losses.sum().backward()
    assert torch.isfinite(policy.token_logps.grad).all()
    for number, name in enumerate(("plain", "intra", "inter")):
        assert out.metrics[f"mapl/accuracy_{name}"].isnan().tolist() == [k != number for k in range(3)]


def test_mapl_on_plain_pairs_is_dpo():
    policy, reference, batch = pairs([[-1.0], [-2.0], [-3.0], [-0.5]], mapl_kind=[0.0, 0.0])
    own = MAPL(0.5, 0.7, 0.3, 0.2)(policy, reference, batch).terms[0].losses
    torch.testing.assert_close(own, plain_dpo(0.5, Sigmoid(0.0))(policy, reference, batch).terms[0].losses)


def test_mapl_needs_its_numbers():
    policy, reference, batch = pairs([[-1.0], [-2.0], [-3.0], [-0.5]], mapl_kind=[0.0, 2.0])
    with pytest.raises(ValueError, match='file:2: objective.margin=0.2 needs .*"satisfied_gap"'):
        MAPL(0.5, 0.7, 0.3, 0.2)(policy, reference, batch)
    MAPL(0.5, 0.7, 0.3, 0.0)(policy, reference, batch)  # without a margin nobody asks
    with pytest.raises(ValueError, match='file:1: objective mapl needs .*"mapl_kind"'):
        MAPL(0.5, 0.7, 0.3, 0.0)(policy, reference, replace(batch, numbers={}))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MCTSDPO(0.0, 0.0, False), "objective.beta=0.0"),
        (lambda: MCTSDPO(0.1, -1.0, False), "objective.length_penalty=-1.0: must be at least 0"),
        (lambda: MAPL(0.1, -1.0, 0.0, 0.0), "objective.intra_weight=-1.0"),
        (lambda: MAPL(0.1, 0.0, 0.0, -2.0), "objective.margin=-2.0"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
