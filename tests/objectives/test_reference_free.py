"""SimPO, ORPO, their rationale kin and the likelihood alone: values by hand and limits."""

from __future__ import annotations

import math

import pytest
import torch

from align.objectives.imitation import NLL
from align.objectives.losses import Hinge, IpoMean, Sigmoid
from align.objectives.rationale import RDPO, RORPO
from align.objectives.reference_free import ORPO, SimPO
from tests.objectives.build import reduced, rows_of, select, stats_of

LN2 = math.log(2)


def log_odds(mean):
    return mean - math.log(1 - math.exp(mean))


# ---------------------------------------------------------------------- NLL


def test_nll_is_a_mean_over_tokens_and_reads_chosen_only():
    policy, batch = rows_of([[-1.0, -3.0], [-5.0], [-9.0], [-9.0]])
    out = NLL()(policy, None, batch)
    loss = reduced(out, batch)
    assert loss.item() == pytest.approx(3.0, abs=1e-15)
    loss.backward()
    assert policy.token_logps.grad.tolist() == pytest.approx([-1 / 3] * 3 + [0, 0])
    assert out.metrics["nll"].tolist() == [2.0, 5.0]


def test_nll_with_weights():
    # (0.5 * 1 + 2 * 3) / 2.5
    policy, batch = rows_of([[-1.0, -3.0]], 1, weights=torch.tensor([0.5, 2.0]).double())
    out = NLL()(policy, None, batch)
    assert reduced(out, batch).item() == pytest.approx(2.6, abs=1e-15)
    assert out.metrics["nll"].tolist() == pytest.approx([2.6])


# ---------------------------------------------------------------------- SimPO


def test_simpo_by_hand():
    # means -1.5 and -4, margin 0.5 per token: z = 2 (-1.5 + 4 - 0.5) = 4
    policy, batch = rows_of([[-1.0, -2.0], [-4.0]])
    out = SimPO(2.0, 0.5, Sigmoid(0.0))(policy, None, batch)
    assert out.terms[0].losses.item() == pytest.approx(math.log(1 + math.exp(-4)), abs=1e-14)
    assert out.metrics["reward/margin"].item() == pytest.approx(5.0, abs=1e-14)
    assert out.metrics["logps/chosen"].item() == -3.0


def test_simpo_does_not_depend_on_length():
    short, batch = rows_of([[-1.0], [-2.0]])
    long, other = rows_of([[-1.0] * 7, [-2.0] * 3])
    objective = SimPO(2.0, 0.5, Sigmoid(0.1))
    a, b = (objective(p, None, x).terms[0].losses.item() for p, x in ((short, batch), (long, other)))
    assert a == pytest.approx(b, abs=1e-14)


# ---------------------------------------------------------------------- ORPO


@pytest.mark.parametrize("scope, nll", [("completion", 3.0), ("whole", 16 / 5)])
def test_orpo_by_hand(scope, nll):
    # means -1.5 and -6 of chosen, -4 and -1 of rejected; the whole chosen rows have 5 tokens with a sum of -16
    values = [[-1.0, -2.0], [-6.0], [-4.0], [-1.0]]
    if scope == "whole":
        values += [[-5.0, -1.0, -2.0], [-2.0, -6.0]]
    objective = ORPO(0.5, scope)
    assert objective.columns == (("chosen_whole",) if scope == "whole" else ())
    policy, batch = rows_of(values, 2 + len(objective.columns))
    out = objective(policy, None, batch)
    ratios = [log_odds(-1.5) - log_odds(-4.0), log_odds(-6.0) - log_odds(-1.0)]
    odds = sum(math.log(1 + math.exp(-r)) for r in ratios) / 2
    assert reduced(out, batch).item() == pytest.approx(0.5 * odds + nll, abs=1e-12)
    assert out.metrics["odds/log_ratio"].tolist() == pytest.approx(ratios, abs=1e-12)


def test_gradient_of_the_odds():
    # d loss / d mean of chosen = -lambda s(-o) / (1 - e^m)
    policy, batch = rows_of([[-0.7], [-1.1]])
    out = ORPO(0.3, "completion")(policy, None, batch)
    (out.terms[0].weight * out.terms[0].losses).sum().backward()
    o = log_odds(-0.7) - log_odds(-1.1)
    expected = -0.3 / (1 + math.exp(o)) / (1 - math.exp(-0.7))
    assert policy.token_logps.grad[0].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("values", [[[], [-1.0]], [[-1.0], []], [[0.0], [-1e-9]], [[-800.0], [-1e-30]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_at_their_limits_are_finite(values, dtype):
    policy, batch = rows_of(values)
    leaf = policy.token_logps.detach().to(dtype).requires_grad_()
    out = ORPO(0.5, "completion")(stats_of(leaf, batch), None, batch)
    loss = reduced(out, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(leaf.grad).all()


# ---------------------------------------------------------------------- rationales


def test_rdpo_by_hand():
    # the pair: z = 1.5 as in DPO's test; the rationale's sum is -4, gamma 0.25
    policy, batch = rows_of([[-0.5, -0.5], [-3.0], [-1.0, -3.0]], 3)
    reference = stats_of(torch.tensor([-1.0, -1.0, -1.0, -9.0, -9.0]).double(), batch)
    base = math.log(1 + math.exp(-1.5))
    code, paper = (RDPO(0.5, Sigmoid(0.0), 0.25, v)(policy, reference, batch) for v in ("code_logsigmoid", "nll"))
    assert reduced(code, batch).item() == pytest.approx(base + math.log(1 + math.e), abs=1e-14)
    assert reduced(paper, batch).item() == pytest.approx(base + 1.0, abs=1e-14)
    assert code.metrics["rationale/nll"].tolist() == [2.0]


def test_weight_of_the_rationale_in_the_gradient():
    """The authors' form weighs a token's gradient by gamma s(-gamma S), between gamma / 2 and gamma."""
    policy, batch = rows_of([[-1.0], [-1.0], [-30.0]], 3)
    reduced(RDPO(0.1, Sigmoid(0.0), 0.1, "code_logsigmoid")(policy, policy, batch), batch).backward()
    assert -policy.token_logps.grad[2].item() == pytest.approx(0.1 / (1 + math.exp(-3)), abs=1e-14)


@pytest.mark.parametrize("scope, nll", [("completion", 1.5), ("whole", 3.0)])
def test_rorpo_by_hand(scope, nll):
    # rationale mean -2; chosen mean -1.5, or -3 with its prompt; rejected mean -4
    values = [[-1.0, -2.0], [-4.0], [-1.0, -3.0]] + ([[-6.0, -1.0, -2.0]] if scope == "whole" else [])
    ratio = log_odds(-1.5) - log_odds(-4.0)
    for variant, rationale in (("rorpo", math.log(1 + math.exp(0.6))), ("rorpo_simple", 0.6)):
        objective = RORPO(0.5, scope, 0.3, variant)
        policy, batch = rows_of(values, 2 + len(objective.columns))
        loss = reduced(objective(policy, None, batch), batch).item()
        assert loss == pytest.approx(0.5 * math.log(1 + math.exp(-ratio)) + rationale + nll, abs=1e-12)


# ---------------------------------------------------------------------- all


@pytest.mark.parametrize(
    "objective",
    [NLL(), SimPO(2.0, 0.3, Sigmoid(0.1)), ORPO(0.1, "whole"), RDPO(0.1, Sigmoid(0.0), 0.1, "nll"),
     RORPO(0.1, "whole", 1.0, "rorpo")],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_loss_and_gradient_do_not_depend_on_micro_batches(objective):
    generator = torch.Generator().manual_seed(0)
    columns = 2 + len(objective.columns)
    values = [(-3 * torch.rand(1 + i % 4, generator=generator)).tolist() for i in range(5 * columns)]
    values[2] = []
    policy, batch = rows_of(values, columns)
    reference = stats_of(torch.full_like(policy.token_logps, -1.0).detach(), batch)
    whole = reduced(objective(policy, reference, batch), batch)
    parts = [(select(policy, batch, p), select(reference, batch, p)[0]) for p in ([4, 1], [0], [3, 2])]
    split = sum(reduced(objective(stats, ref, part), batch) for (stats, part), ref in parts)
    assert split.item() == pytest.approx(whole.item(), abs=1e-13)
    a, b = (torch.autograd.grad(loss, policy.token_logps, retain_graph=True)[0] for loss in (whole, split))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SimPO(0.0, 0.1, Hinge()), "objective.beta=0.0"),
        (lambda: SimPO(2.0, -0.1, Hinge()), "objective.gamma_beta_ratio=-0.1: must be at least 0"),
        (lambda: SimPO(2.0, 0.1, IpoMean()), "SimPO cannot be combined with objective.loss=IpoMean"),
        (lambda: ORPO(-1.0, "whole"), "objective.odds_weight=-1.0"),
        (lambda: ORPO(0.1, "prompt"), "objective.nll_scope=prompt: must be one of whole, completion"),
        (lambda: RDPO(0.1, Hinge(), -1.0, "nll"), "objective.gamma=-1.0"),
        (lambda: RDPO(0.1, Hinge(), 0.1, "code"), "objective.variant=code: must be one of code_logsigmoid, nll"),
        (lambda: RORPO(0.1, "whole", 0.1, "simple"), "objective.variant=simple: must be one of rorpo, rorpo_simple"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
