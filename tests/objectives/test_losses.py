"""Base losses at their limits: known values, huge log-ratios, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from align.objectives.losses import (
    ApoDown,
    ApoZero,
    BcoPair,
    DiscoPop,
    ExoPair,
    Hinge,
    IpoMean,
    IpoSum,
    NcaPair,
    Ratios,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SppoHard,
)

LN2 = math.log(2)
# loss -> its value where policy and reference agree, with beta 0.5; (1 / (2 beta))^2 = 1
AT_ZERO = {
    Sigmoid(0.0): LN2, Sigmoid(0.3): LN2, SigmoidNorm(): LN2, Robust(0.2): LN2, Hinge(): 1.0, IpoSum(): 1.0,
    IpoMean(): 1.0, ExoPair(0.1): -LN2 - 0.5 * math.log(0.09), NcaPair(): 2 * LN2, BcoPair(): 2 * LN2, SppoHard(): 2.0,
    ApoZero(): 1.0, ApoDown(): 1.0, DiscoPop(0.05): 0.5 * LN2 + 0.5,
}  # fmt: skip
each_loss = pytest.mark.parametrize("loss", AT_ZERO, ids=lambda x: type(x).__name__)


def ratios(chosen, rejected, dtype=torch.float64, lengths=(1, 1)):
    a, b = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in (chosen, rejected))
    return Ratios(a, b, torch.tensor([lengths[0]]), torch.tensor([lengths[1]]))


@each_loss
def test_value_where_policy_and_reference_agree(loss):
    assert loss(ratios(0.0, 0.0), 0.5).item() == pytest.approx(AT_ZERO[loss], abs=1e-15)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen, rejected", [(-800.0, 800.0), (800.0, -800.0), (-4e4, 0.0), (0.0, 0.0), (-800, -800)])
def test_huge_ratios_stay_finite(loss, dtype, chosen, rejected):
    r = ratios(chosen, rejected, dtype)
    value = loss(r, 1.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(r.chosen.grad).all()
    assert torch.isfinite(r.rejected.grad).all()


@each_loss
def test_difference_says_whether_a_common_shift_matters(loss):
    """True for exactly those that read nothing but the difference of the sums, whatever the lengths."""
    values = [loss(ratios(0.3 + s, -0.4 + s, lengths=n), 0.5).item() for s in (0.0, 0.7) for n in ((1, 1), (3, 5))]
    spread = max(values) - min(values)
    assert (spread < 1e-14) is loss.difference


@each_loss
def test_gradient_prefers_chosen(loss):
    """At the start each loss moves the difference towards chosen; APO-down lowers chosen too, but rejected more.

    But for DiscoPOP, which has a hill there: the slope by z at 0 is (1 - ln 2) / (4 tau) - 3/4.
    """
    r = ratios(0.0, 0.0)
    loss(r, 0.5).sum().backward()
    if isinstance(loss, DiscoPop):
        assert r.chosen.grad.item() == pytest.approx(0.5 * ((1 - LN2) / (4 * 0.05) - 0.75), abs=1e-14)
    else:
        assert r.chosen.grad.item() < r.rejected.grad.item()
        assert r.rejected.grad.item() > 0


def test_discopop_is_logistic_on_the_left_and_exponential_on_the_right():
    # m is s(z / 0.05): below 1e-8 at z = -1, 1 - 1e-8 at z = 1
    for z, expected in ((-1.0, math.log(1 + math.e)), (1.0, math.exp(-1))):
        assert DiscoPop(0.05)(ratios(z, 0.0), 1.0).item() == pytest.approx(expected, abs=1e-7)


def test_robust_is_unbiased():
    """Its mean over flipped and kept labels is the loss of the true label."""
    e, z = 0.2, 1.3
    mean = (1 - e) * Robust(e)(ratios(z, 0.0), 1.0) + e * Robust(e)(ratios(0.0, z), 1.0)
    assert mean.item() == pytest.approx(math.log(1 + math.exp(-z)), abs=1e-14)


def test_length_normalised_losses_read_means():
    # 2 / 4 - 3 / 2 = -1
    r = ratios(2.0, 3.0, lengths=(4, 2))
    assert SigmoidNorm()(r, 2.0).item() == pytest.approx(math.log(1 + math.exp(2)), abs=1e-14)
    assert IpoMean()(r, 0.5).item() == pytest.approx(4.0, abs=1e-14)
    assert IpoSum()(r, 0.5).item() == pytest.approx(4.0, abs=1e-14)  # 2 - 3 - 1


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Sigmoid(0.5), "objective.loss.label_smoothing=0.5: must be at least 0 and below 0.5"),
        (lambda: Robust(-0.1), "objective.loss.label_smoothing=-0.1"),
        (lambda: ExoPair(0.0), "objective.loss.label_smoothing=0.0: must be greater than 0"),
        (lambda: DiscoPop(0.0), "objective.loss.tau=0.0: must be greater than 0 and at most 1"),
        (lambda: DiscoPop(1.5), "objective.loss.tau=1.5"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
