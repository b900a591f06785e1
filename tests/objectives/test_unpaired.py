"""KTO and APO-zero on labelled completions: values by hand, the common point, invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from align.objectives.unpaired import KTO, ApoZeroUnpaired, reversed_partners, rotated_partners
from align.types import Extras
from tests.objectives.build import reduced, rows_of, select, stats_of


def labelled(values, labels, point=(0.0,)):
    """Policy (leaf), a reference of zeros, so that h is the sum of a row's values, and the batch."""
    steps = torch.tensor(point, dtype=torch.float64)[:, None]
    policy, batch = rows_of(values, 1, labels=torch.tensor(labels), extras=Extras(step_values=steps))
    return policy, stats_of(torch.zeros_like(policy.token_logps), batch), batch


def s(x):
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand():
    # h = -1 and -3; the point is mean(0.5, 1.5) = 1: desirable 2 s(0.5 (1 + 1)), undesirable 3 s(0.5 (-3 - 1))
    policy, reference, batch = labelled([[-0.4, -0.6], [-3.0]], [True, False], (0.5, 1.5))
    out = KTO(0.5, 2.0, 3.0)(policy, reference, batch)
    assert out.terms[0].losses.tolist() == pytest.approx([2 * s(1.0), 3 * s(-2.0)], abs=1e-14)
    assert out.metrics["kl"].tolist() == [1.0, 1.0]
    assert out.metrics["accuracy"].tolist() == [0.0, 1.0]


def test_equal_networks_give_half_the_weight_and_no_accuracy():
    policy, _, batch = labelled([[-1.0], [-2.0]], [True, False])
    out = KTO(0.1, 1.0, 0.6)(policy, policy, batch)
    assert out.terms[0].losses.tolist() == pytest.approx([0.5, 0.3], abs=1e-15)
    assert out.metrics["accuracy"].tolist() == [0.0, 0.0]


def test_the_mean_is_clamped_not_its_parts():
    # mean(-3, 1) = -1 becomes 0; clamping each first would give 0.5
    policy, reference, batch = labelled([[-1.0]], [True], (-3.0, 1.0))
    assert KTO(0.1, 1.0, 1.0)(policy, reference, batch).metrics["kl"].tolist() == [0.0]


def test_signs_of_the_gradient():
    policy, reference, batch = labelled([[-1.0], [-1.0]], [True, False], (0.3,))
    KTO(0.1, 1.0, 1.0)(policy, reference, batch).terms[0].losses.sum().backward()
    assert policy.token_logps.grad[0] < 0 < policy.token_logps.grad[1]


def test_no_gradient_through_the_point():
    policy, reference, batch = labelled([[-1.0], [-2.0]], [True, True])
    objective = KTO(0.1, 1.0, 1.0)
    values = objective.step_values(policy, reference, batch)
    assert values.tolist() == [[-1.0], [-2.0]]
    assert not values.requires_grad


@pytest.mark.parametrize("objective", [KTO(0.3, 1.2, 0.7), ApoZeroUnpaired(0.3)], ids=lambda o: type(o).__name__)
def test_loss_and_gradient_do_not_depend_on_micro_batches(objective):
    values = [[-1.0, -0.5], [-2.0], [0.3], [-0.1, -0.2, -0.3], []]
    policy, reference, batch = labelled(values, [True, False, True, False, True], (0.2, 0.9, -0.3, 0.4, 0.0))
    whole = reduced(objective(policy, reference, batch), batch)
    parts = [(select(policy, batch, p), select(reference, batch, p)[0]) for p in ([3], [0, 4], [2, 1])]
    split = sum(reduced(objective(stats, ref, part), batch) for (stats, part), ref in parts)
    assert split.item() == pytest.approx(whole.item(), abs=1e-14)
    a, b = (torch.autograd.grad(loss, policy.token_logps, retain_graph=True)[0] for loss in (whole, split))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_metrics_of_a_step_with_one_kind_of_label(labels):
    policy, reference, batch = labelled([[-1.0], [-2.0]], labels, (0.5,))
    metrics = KTO(0.1, 1.0, 1.0)(policy, reference, batch).metrics
    given, absent = ("chosen", "rejected") if labels[0] else ("rejected", "chosen")
    for group in ("reward", "logps"):
        assert metrics[f"{group}/{absent}"].isnan().all()
    assert metrics[f"reward/{given}"].tolist() == pytest.approx([-0.1, -0.2])
    assert metrics[f"logps/{given}"].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("objective", [KTO(0.1, 1.0, 1.0), ApoZeroUnpaired(0.1)], ids=lambda o: type(o).__name__)
def test_huge_ratios_stay_finite(objective):
    policy, reference, batch = labelled([[-8e3], [8e3], [-8e3], [8e3], []], [True, True, False, False, True], (8e3,))
    losses = objective(policy, reference, batch).terms[0].losses
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(policy.token_logps.grad).all()


def test_apo_zero_is_kto_with_the_point_at_zero():
    policy, reference, batch = labelled([[-1.0], [-2.0]], [True, False])
    a, b = (o(policy, reference, batch).terms[0].losses for o in (ApoZeroUnpaired(0.4), KTO(0.4, 1.0, 1.0)))
    assert torch.equal(a, b)


def test_partners_at_the_edges():
    assert rotated_partners(3, 10) == [2, 0, 1]
    assert rotated_partners(1, 4) == reversed_partners(1, 4) == [0]
    assert rotated_partners(0, 4) == []
    # in an odd chunk the reversed order gives the middle prompt its own completion, the rotation none
    assert reversed_partners(5, 5)[2] == 2
    assert all(partner != i for i, partner in enumerate(rotated_partners(5, 5)))


def test_labels_are_needed():
    policy, reference, batch = labelled([[-1.0]], [True])
    for objective in (KTO(0.1, 1.0, 1.0), ApoZeroUnpaired(0.1)):
        with pytest.raises(ValueError, match="the batch has no labels"):
            objective(policy, reference, replace(batch, labels=None))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: KTO(0.0, 1.0, 1.0), "objective.beta=0.0"),
        (lambda: KTO(0.1, -1.0, 1.0), "objective.desirable_weight=-1.0: must be greater than 0"),
        (lambda: KTO(0.1, 1.0, math.inf), "objective.undesirable_weight=inf"),
        (lambda: ApoZeroUnpaired(-0.1), "objective.beta=-0.1"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
