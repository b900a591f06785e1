"""Objectives over pairs with a reference, against values derived by hand and invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from align.objectives.losses import Hinge, IpoSum, NcaPair, Robust, Sigmoid, SigmoidNorm
from align.objectives.preference import AOT, INPO, RPO, WPO, beyond_shorter
from align.packing import with_extras
from tests.conftest import plain_dpo
from tests.objectives.build import batch_of, reduced, rows_of, select, stats_of, with_step

LN2 = math.log(2)


def zeros_like(policy, batch):
    return stats_of(torch.zeros_like(policy.token_logps), batch)


def random_pairs(num=6, seed=0, **fields):
    """Pairs of 1 to 5 tokens and one empty completion, policy as a leaf, and reference."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (2 * num,), generator=generator).tolist()
    lengths[num + 1] = 0
    rows = [(-3 * torch.rand(n, generator=generator)).tolist() for n in lengths]
    policy, batch = rows_of(rows, **fields)
    noise = torch.rand(len(policy.token_logps), generator=generator).double()
    return policy, stats_of(policy.token_logps.detach() - noise, batch), batch


# ---------------------------------------------------------------------- DPO


def test_dpo_by_hand():
    # chosen -1 against reference -2, rejected -3 against -1: D = 1 - (-2) = 3; beta 0.5: z = 1.5
    # loss = log(1 + e^-1.5)
    policy, batch = rows_of([[-0.5, -0.5], [-3.0]])
    reference = stats_of(torch.tensor([-1.0, -1.0, -1.0]).double(), batch)
    loss = plain_dpo(0.5, Sigmoid(0.0))(policy, reference, batch).terms[0].losses
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-14)


@pytest.mark.parametrize("loss", [Sigmoid(0.0), Sigmoid(0.2)])
def test_equal_networks_give_ln2_and_no_accuracy(loss):
    # a tie is not a win
    policy, batch = rows_of([[-0.5, -0.25], [-3.0]])
    out = plain_dpo(0.1, loss)(policy, policy, batch)
    assert out.terms[0].losses.item() == pytest.approx(LN2, abs=1e-15)
    assert out.metrics["accuracy"].item() == 0.0


def test_gradient_raises_chosen_and_lowers_rejected():
    policy, batch = rows_of([[-1.0], [-1.0]])
    plain_dpo(0.1, Sigmoid(0.0))(policy, policy, batch).terms[0].losses.sum().backward()
    # -beta s(-z) = -0.05 at z = 0
    assert policy.token_logps.grad.tolist() == pytest.approx([-0.05, 0.05], abs=1e-15)


def test_target_weights_scale_sums_and_lengths():
    # chosen 1/2 * -2 - 1/4 * -4 = -2 over length 3/4; rejected -1 over 1: the difference per token is -8/3 + 1
    weights = torch.tensor([0.5, 0.25, 1.0]).double()
    policy, batch = rows_of([[-2.0, -4.0], [-1.0]], weights=weights)
    zero = zeros_like(policy, batch)
    out = plain_dpo(1.0, SigmoidNorm())(policy, zero, batch)
    assert out.terms[0].losses.item() == pytest.approx(math.log(1 + math.exp(8 / 3 - 1)), abs=1e-12)
    assert out.metrics["reward/margin"].item() == pytest.approx(-1.0, abs=1e-12)


@pytest.mark.parametrize("f_divergence, f_alpha", [("forward_kl", None), ("js", None), ("alpha", 0.5), ("alpha", 2.0)])
def test_divergences_have_the_slope_of_reverse_kl_where_policy_and_reference_agree(f_divergence, f_alpha):
    """f''(1) = 1 for each but Jensen-Shannon's 1/2, so the gradients at the start are those of DPO or half of them."""
    policy, batch = rows_of([[-1.0], [-2.0]])
    loss = plain_dpo(0.1, Sigmoid(0.0), f_divergence, f_alpha)(policy, policy, batch).terms[0].losses
    loss.sum().backward()
    assert loss.item() == pytest.approx(LN2, abs=1e-15)
    slope = 0.5 if f_divergence == "js" else 1.0
    assert policy.token_logps.grad.tolist() == pytest.approx([-0.05 * slope, 0.05 * slope], abs=1e-15)


def test_alpha_divergence_by_hand_and_its_limits():
    # alpha 2: f'(t) = t - 1, ratios e^0.5 and e^-1: z = beta (e^0.5 - e^-1)
    policy, batch = rows_of([[0.5], [-1.0]])
    zero = zeros_like(policy, batch)
    value = plain_dpo(0.3, Sigmoid(0.0), "alpha", 2.0)(policy, zero, batch).terms[0].losses.item()
    assert value == pytest.approx(math.log(1 + math.exp(-0.3 * (math.exp(0.5) - math.exp(-1)))), abs=1e-12)
    near_one, forward = plain_dpo(0.3, Sigmoid(0.0), "alpha", 1 + 1e-7), plain_dpo(0.3, Sigmoid(0.0), "alpha", 0.0)
    for a, b in ((near_one, plain_dpo(0.3, Sigmoid(0.0))), (forward, plain_dpo(0.3, Sigmoid(0.0), "forward_kl"))):
        left, right = (o(policy, zero, batch).terms[0].losses.item() for o in (a, b))
        assert left == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("f_divergence, f_alpha", [("forward_kl", None), ("js", None), ("alpha", 0.5), ("alpha", 2.0)])
def test_divergences_at_huge_ratios(f_divergence, f_alpha):
    """Finite in float32 wherever the exponent ends, and exact until 80."""
    for chosen, rejected in ((-800.0, 800.0), (800.0, -800.0), (-800.0, -800.0)):
        policy, batch = rows_of([[chosen], [rejected]])
        leaf = policy.token_logps.detach().float().requires_grad_()
        policy = stats_of(leaf, batch)
        loss = (
            plain_dpo(0.1, Sigmoid(0.0), f_divergence, f_alpha)(policy, zeros_like(policy, batch), batch)
            .terms[0]
            .losses
        )
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(leaf.grad).all()
    # hinge, beta 1: 1 - f'(e^chosen) + f'(e^rejected), f' of forward KL 1 - e^-D: 1 + e^79 - e^-1
    policy, batch = rows_of([[-79.0], [1.0]])
    loss = plain_dpo(1.0, Hinge(), "forward_kl")(policy, zeros_like(policy, batch), batch).terms[0].losses.item()
    assert loss == pytest.approx(1 + math.exp(79) - math.exp(-1), rel=1e-12)


def test_ld_alpha_counts_the_tail_of_the_longer_completion_less():
    # lengths 4 and 2 and 0 and 1: the third and fourth token of the first, and the only token of the last, are beyond
    row = torch.tensor([0, 0, 0, 0, 2, 2, 3])
    batch = batch_of(row, 4)
    assert beyond_shorter(batch, 0.25).tolist() == [1, 1, 0.25, 0.25, 1, 1, 0.25]
    policy, reference, batch = random_pairs()
    plain = plain_dpo(0.1, Sigmoid(0.0))(policy, reference, batch)
    off = plain_dpo(0.1, Sigmoid(0.0), ld_alpha=1.0)(policy, reference, batch)
    assert torch.equal(plain.terms[0].losses, off.terms[0].losses)


def test_ld_alpha_leaves_further_columns_alone():
    row = torch.tensor([0, 1, 1, 2, 2, 2])
    assert beyond_shorter(batch_of(row, 3, num_columns=3), 0.5).tolist() == [1, 1, 0.5, 1, 1, 1]


# ---------------------------------------------------------------------- WPO


def test_wpo_weight_by_hand():
    # mean over tokens of logp - log collision: chosen (-1 + 0.6 - 2 + 1)/2 = -0.7, rejected -1.5 + 0.2 = -1.3
    policy, batch = rows_of([[-1.0, -2.0], [-1.5]])
    policy = replace(policy, log_collision=torch.tensor([-0.6, -1.0, -0.2], dtype=torch.float64))
    out = WPO(0.1, Sigmoid(0.0), "sampled", 1.0)(policy, policy, batch)
    assert out.metrics["wpo/weight"].item() == pytest.approx(math.exp(-2.0), abs=1e-12)
    assert out.terms[0].losses.item() == pytest.approx(math.exp(-2.0) * LN2, abs=1e-12)
    assert out.metrics["reward/margin"].item() == 0.0  # metrics carry no weight


def test_wpo_clamps_the_product_not_the_factors():
    # weights e^0.5 and e^-0.7: product e^-0.2 < 1 stays; clamping each first would give e^-0.7
    policy, batch = rows_of([[-0.5], [-1.7]])
    policy = replace(policy, log_collision=torch.tensor([-1.0, -1.0]).double())
    weight = WPO(0.1, Sigmoid(0.0), "sampled", 1.0)(policy, policy, batch).metrics["wpo/weight"]
    assert weight.item() == pytest.approx(math.exp(-0.2), abs=1e-12)


@pytest.mark.parametrize("num_pairs", [1, 2, 3])
def test_wpo_weight_is_a_mean_over_tokens_at_any_batch_size(num_pairs):
    """Two rows of 20 tokens with sums -32 and -33 weigh e^(-65/20) = 0.0388.

    open-instruct multiplies the sums by a token mask: exp(-65) = 5.9e-29 for one pair, a shape error for more.
    """
    policy, batch = rows_of([[-1.6] * 20] * num_pairs + [[-1.65] * 20] * num_pairs)
    weight = WPO(0.1, Sigmoid(0.0), "none", None)(policy, policy, batch).metrics["wpo/weight"]
    assert weight.tolist() == pytest.approx([math.exp(-3.25)] * num_pairs, rel=1e-12)
    assert weight[0].item() == pytest.approx(0.0388, abs=5e-5)


def test_wpo_weight_is_a_weighted_mean_with_target_weights():
    # (1 * -1 + 0.5 * -4) / 1.5 = -2 for chosen, -1 for rejected
    weights = torch.tensor([1.0, 0.5, 0.25]).double()
    policy, batch = rows_of([[-1.0, -4.0], [-1.0]], weights=weights)
    weight = WPO(0.1, Sigmoid(0.0), "none", None)(policy, policy, batch).metrics["wpo/weight"]
    assert weight.item() == pytest.approx(math.exp(-3.0), abs=1e-12)


def test_empty_completion_has_weight_one_and_poisons_nothing():
    policy, batch = rows_of([[], [-1.0]])
    out = WPO(0.1, Sigmoid(0.0), "none", None)(policy, policy, batch)
    assert out.metrics["wpo/weight"].item() == pytest.approx(math.exp(-1.0), abs=1e-15)
    assert torch.isfinite(out.terms[0].losses).all()


# ---------------------------------------------------------------------- RPO


def test_rpo_by_hand():
    # two pairs; chosen sums -3 (2 tokens) and -4 (1 token), equal to the reference: base loss ln 2
    policy, batch = rows_of([[-1.0, -2.0], [-4.0], [-1.0], [-5.0]])

    def loss(normalisation, weight):
        return reduced(RPO(0.5, Sigmoid(0.0), normalisation, weight)(policy, policy, batch), batch).item()

    assert loss("sum", 0.2) == pytest.approx(LN2 + 0.2 * 0.5 * 3.5, abs=1e-12)
    assert loss("sequence_mean", 0.2) == pytest.approx(LN2 + 0.2 * (1.5 + 4.0) / 2, abs=1e-12)
    assert loss("token_mean", 0.2) == pytest.approx(LN2 + 0.2 * 7 / 3, abs=1e-12)
    nll = RPO(0.5, Sigmoid(0.0), "sum", 0.2)(policy, policy, batch).metrics["nll"]
    assert nll.tolist() == pytest.approx([1.5, 4.0], abs=1e-12)


def test_rpo_imitates_chosen_only():
    policy, batch = rows_of([[-1.0, -2.0], [-4.0]])
    for normalisation in ("sum", "sequence_mean", "token_mean"):
        with_term, without = (
            torch.autograd.grad(
                reduced(RPO(0.5, Sigmoid(0.0), normalisation, w)(policy, policy, batch), batch),
                policy.token_logps,
                retain_graph=True,
            )[0]
            for w in (0.3, 0.0)
        )
        assert (with_term[:2] < without[:2]).all()
        assert with_term[2] == without[2]


# ---------------------------------------------------------------------- AOT


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[4, 1], [0, 5, 3], [2]], [[5], [4], [3], [2], [1], [0]]])
def test_aot_does_not_depend_on_micro_batches(paired, split):
    objective = AOT(0.3, Sigmoid(0.1), paired)
    policy, reference, batch = random_pairs()
    batch = with_step(objective, policy, reference, batch)
    parts = [(select(policy, batch, p), select(reference, batch, p)[0]) for p in split]
    total = sum(reduced(objective(stats, ref, part), batch) for (stats, part), ref in parts)
    (gradient,) = torch.autograd.grad(total, policy.token_logps)

    # the definition, on the whole step
    u, v = (s.logps[batch.groups] for s in (policy, reference))
    if paired:
        left, right = (u[:, 0] - u[:, 1]).sort().values, (v[:, 0] - v[:, 1]).sort().values
    else:
        left, right = (u - v)[:, 0].sort().values, (u - v)[:, 1].sort().values
    z = 0.3 * (left - right)
    expected = (-0.9 * torch.nn.functional.logsigmoid(z) - 0.1 * torch.nn.functional.logsigmoid(-z)).mean()
    (expected_gradient,) = torch.autograd.grad(expected, policy.token_logps)
    assert total.item() == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("paired", [True, False])
def test_aot_with_ties_is_finite_and_of_one_pair_is_dpo(paired):
    objective = AOT(0.3, Sigmoid(0.0), paired)
    policy, batch = rows_of([[-1.0], [-1.0], [-1.0], [-1.0]])
    batch = with_step(objective, policy, policy, batch)
    assert objective(policy, policy, batch).terms[0].losses.tolist() == pytest.approx([LN2, LN2], abs=1e-15)
    policy, reference, batch = random_pairs(1 + 1)
    stats, part = select(policy, batch, [0])
    ref, _ = select(reference, batch, [0])
    one = with_step(objective, stats, ref, part)
    (a,) = torch.autograd.grad(reduced(objective(stats, ref, one), one), policy.token_logps, retain_graph=True)
    (b,) = torch.autograd.grad(reduced(plain_dpo(0.3, Sigmoid(0.0))(stats, ref, part), part), policy.token_logps)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------- INPO


def test_inpo_with_one_anchor_is_ipo():
    policy, reference, batch = random_pairs()
    start = torch.rand(len(batch.row), generator=torch.Generator().manual_seed(1)).double() - 3
    ipo = plain_dpo(0.2, IpoSum())
    only_reference = INPO(0.2, 0.2)(policy, reference, with_extras(batch, {"start_token_logps": start}))
    torch.testing.assert_close(only_reference.terms[0].losses, ipo(policy, reference, batch).terms[0].losses)
    same = INPO(0.2, 0.05)(policy, reference, with_extras(batch, {"start_token_logps": reference.token_logps}))
    torch.testing.assert_close(same.terms[0].losses, ipo(policy, reference, batch).terms[0].losses)


def test_inpo_needs_the_start_policy():
    policy, reference, batch = random_pairs()
    with pytest.raises(ValueError, match="start_token_logps is not among the extras"):
        INPO(0.2, 0.1)(policy, reference, batch)


# ---------------------------------------------------------------------- all


@pytest.mark.parametrize(
    "objective",
    [plain_dpo(0.1, Sigmoid(0.1)), plain_dpo(0.1, SigmoidNorm(), ld_alpha=0.2), WPO(0.1, Sigmoid(0.0), "none", None),
     RPO(0.1, Hinge(), "token_mean", 1.0), RPO(0.1, NcaPair(), "sum", 1.0)],
    ids=lambda o: type(o).__name__,
)  # fmt: skip
def test_loss_and_gradient_do_not_depend_on_micro_batches(objective):
    weights = torch.rand(200, generator=torch.Generator().manual_seed(3)).double()
    policy, reference, plain = random_pairs()
    batch = replace(batch_of(plain.row, len(plain.lengths), weights=weights[: len(plain.row)] + 0.1))
    policy, reference = (stats_of(s.token_logps, batch) for s in (policy, reference))
    leaf = policy.token_logps
    whole = reduced(objective(policy, reference, batch), batch)
    parts = [(select(policy, batch, p), select(reference, batch, p)[0]) for p in ([3, 0], [1], [5, 2, 4])]
    split = sum(reduced(objective(stats, ref, part), batch) for (stats, part), ref in parts)
    assert split.item() == pytest.approx(whole.item(), abs=1e-13)
    a, b = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (whole, split))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_reference_gets_no_gradient():
    policy, batch = rows_of([[-1.0], [-2.0]])
    reference, _ = rows_of([[-1.5], [-1.0]])
    batch = with_extras(batch, {"start_token_logps": torch.tensor([-1.0, -3.0]).double()})
    sigmoid = Sigmoid(0.0)
    aot = [AOT(0.1, sigmoid, paired) for paired in (True, False)]
    for objective in (
        plain_dpo(0.1, sigmoid),
        plain_dpo(0.1, sigmoid, ld_alpha=0.5),
        RPO(0.1, sigmoid, "sum", 1.0),
        INPO(1, 1),
        *aot,
    ):
        own = with_step(objective, policy, reference, batch) if objective in aot else batch
        reduced(objective(policy, reference, own), own).backward(retain_graph=True)
        assert reference.token_logps.grad is None


def test_no_pairs():
    policy, batch = rows_of([])
    with pytest.raises(ValueError, match="the batch has no pairs"):
        plain_dpo(0.1, Hinge())(policy, policy, batch)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: plain_dpo(0.0, Hinge()), r"objective\.beta=0\.0: must be greater than 0"),
        (lambda: plain_dpo("x", Hinge()), "objective.beta=x: must be greater than 0"),
        (lambda: plain_dpo(True, Hinge()), "objective.beta=True: must be greater than 0"),
        (lambda: plain_dpo(math.inf, Hinge()), r"objective\.beta=inf"),
        (lambda: plain_dpo(math.nan, Hinge()), r"objective\.beta=nan"),
        (lambda: plain_dpo(0.1, Hinge(), "kl"), r"objective\.f_divergence=kl: must be one of reverse_kl"),
        (lambda: plain_dpo(0.1, Hinge(), "alpha"), r"objective\.f_alpha=None: .* needs a number"),
        (lambda: plain_dpo(0.1, Hinge(), "alpha", 1.0), r"objective\.f_alpha=1\.0"),
        (lambda: plain_dpo(0.1, Hinge(), "js", 0.5), r"objective\.f_alpha=0\.5: .* needs null"),
        (lambda: plain_dpo(0.1, NcaPair(), "js"), r"objective\.f_divergence=js cannot be combined .*NcaPair"),
        (lambda: plain_dpo(0.1, Hinge(), ld_alpha=1.1), r"objective\.ld_alpha=1\.1: must be between 0 and 1"),
        (lambda: WPO(0.1, Hinge(), "sampeld", 1.0), r"objective\.alignment=sampeld: must be one of"),
        (lambda: WPO(0.1, Hinge(), "greedy", -1.0), r"objective\.clamp_max=-1\.0"),
        (lambda: RPO(0.1, Hinge(), "mean", 1.0), r"objective\.normalisation=mean: must be one of sum"),
        (lambda: RPO(0.1, Hinge(), "sum", -1.0), r"objective\.weight=-1\.0: must be at least 0"),
        (lambda: AOT(0.1, SigmoidNorm(), True), "AOT cannot be combined with objective.loss=SigmoidNorm"),
        (lambda: INPO(0.1, 0.2), r"objective\.tau=0\.2: must be .* at most objective\.eta=0\.1"),
        (lambda: INPO(0.1, 0.0), r"objective\.tau=0\.0"),
        (lambda: Robust(0.5), r"objective\.loss\.label_smoothing=0\.5: must be at least 0 and below 0\.5"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
