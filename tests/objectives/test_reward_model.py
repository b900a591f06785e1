"""Reward models on pairs, lists, attributes and harm: the reference's numbers, values by hand, invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from align.objectives.reward_model import Attributes, BradleyTerry, Cost, RankedList
from tests.objectives.build import reduced
from tests.objectives.scored import leaf, listed, named, part, scored

LN2 = math.log(2)
PLAIN = BradleyTerry(1.0, None, 0.0, 0.0)


def softplus(x):
    return math.log1p(math.exp(x))


# ---------------------------------------------------------------------- Bradley-Terry


@pytest.mark.parametrize("entry", named("bt_loss") + named("bt_temperature_loss"), ids=lambda e: e["name"])
def test_bradley_terry_vectors(entry):
    config, given, wanted = entry["config"], entry["inputs"], entry["expected"]
    chosen, rejected = leaf(given["chosen"]), leaf(given["rejected"])
    numbers = {} if given["margin"] is None else {"lead": given["margin"]}
    policy, batch = scored(chosen, rejected, **numbers)
    objective = BradleyTerry(
        config.get("tau", 1.0), "lead" if numbers else None, config.get("center_rewards_coefficient") or 0.0, 0.0
    )
    out = objective(policy, None, batch)
    loss = reduced(out, batch)
    loss.backward()
    assert loss.item() == pytest.approx(wanted["loss"], abs=1e-9)
    assert chosen.grad.tolist() == pytest.approx(wanted["grad_chosen"], abs=1e-9)
    assert rejected.grad.tolist() == pytest.approx(wanted["grad_rejected"], abs=1e-9)
    means = {name: values.mean().item() for name, values in out.metrics.items()}
    if "accuracy" in wanted:  # these went through float32
        assert means["accuracy"] == pytest.approx(wanted["accuracy"], abs=1e-6)
        assert means["reward/margin"] == pytest.approx(wanted["margin_mean"], abs=1e-9)
        both = (means["reward/chosen"] + means["reward/rejected"]) / 2
        assert both == pytest.approx(wanted["mean_reward"], abs=1e-6)
    if "prob_mean" in wanted:  # theirs counts the margin, which the metric leaves out: -log s(z) knows it
        assert (-out.terms[0].losses).exp().mean().item() == pytest.approx(wanted["prob_mean"], abs=1e-9)


def test_bradley_terry_by_hand():
    # gap 2 - 0.5 = 1.5, margin 0.5: z = 1 / 0.5 = 2; center 0.1 * 2.5^2, l2 0.2 * (4 + 0.25) / 2
    policy, batch = scored(leaf([2.0]), leaf([0.5]), lead=[0.5])
    out = BradleyTerry(0.5, "lead", 0.1, 0.2)(policy, None, batch)
    assert reduced(out, batch).item() == pytest.approx(softplus(-2) + 0.1 * 6.25 + 0.2 * 2.125, abs=1e-14)
    assert out.metrics["probability"].item() == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-15)
    assert out.metrics["reward/margin"].item() == 1.5


def test_no_opinion_is_ln_2_and_wrong():
    policy, batch = scored(leaf([0.3, -7.0]), leaf([0.3, -7.0]))
    out = PLAIN(policy, None, batch)
    assert out.terms[0].losses.tolist() == [pytest.approx(LN2, abs=1e-15)] * 2
    assert out.metrics["accuracy"].tolist() == [0.0, 0.0]
    assert out.metrics["probability"].tolist() == [0.5, 0.5]


def test_exchanged_pairs_have_the_other_accuracy():
    torch.manual_seed(0)
    a, b = torch.randn(2, 51, dtype=torch.float64)
    accuracies = [PLAIN(*_first(scored(*x))).metrics["accuracy"].mean().item() for x in ((a, b), (b, a))]
    assert sum(accuracies) == pytest.approx(1.0, abs=1e-15)
    assert accuracies[0] != 0.5


def _first(given):
    policy, batch = given
    return policy, None, batch


@pytest.mark.parametrize("center, equal", [(0.0, True), (0.01, False)])
def test_only_centring_sees_a_constant(center, equal):
    """Numbers that a shift by 4 leaves exact."""
    losses = []
    for shift in (0.0, 4.0):
        policy, batch = scored(leaf([1.5, -0.25]) + shift, leaf([0.5, 2.0]) + shift)
        losses.append(reduced(BradleyTerry(1.0, None, center, 0.0)(policy, None, batch), batch).item())
    assert (losses[0] == losses[1]) == equal


def test_centring_leaves_the_gap_and_l2_does_not():
    grads = []
    for center, l2 in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.3)):
        chosen, rejected = leaf([1.0]), leaf([-2.0])
        policy, batch = scored(chosen, rejected)
        reduced(BradleyTerry(1.0, None, center, l2)(policy, None, batch), batch).backward()
        grads.append((chosen.grad - rejected.grad).item())
    # d/d chosen - d/d rejected: of c (a + b)^2 it is 0, of l2 (a^2 + b^2) / 2 it is l2 (a - b)
    assert grads[1] == pytest.approx(grads[0], abs=1e-15)
    assert grads[2] == pytest.approx(grads[0] + 0.3 * 3, abs=1e-15)


def test_gradient_says_raise_chosen():
    chosen, rejected = leaf([0.0]), leaf([3.0])
    policy, batch = scored(chosen, rejected)
    reduced(PLAIN(policy, None, batch), batch).backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()


def test_margin_asks_for_more():
    """With a margin equal to the gap the loss is ln 2; the accuracy does not know of it."""
    policy, batch = scored(leaf([3.0]), leaf([1.0]), lead=[2.0])
    out = BradleyTerry(1.0, "lead", 0.0, 0.0)(policy, None, batch)
    assert out.terms[0].losses.item() == pytest.approx(LN2, abs=1e-15)
    assert out.metrics["accuracy"].item() == 1.0


def test_a_row_without_its_margin_is_named():
    policy, batch = scored(leaf([3.0, 3.0]), leaf([1.0, 1.0]), lead=[2.0, math.nan])
    objective = BradleyTerry(1.0, "lead", 0.0, 0.0)
    with pytest.raises(ValueError, match=r'^file:2: objective.margin=lead needs .* add "numbers": \{"lead": ...\}'):
        objective(policy, None, batch)
    PLAIN(policy, None, batch)  # margin=null does not look


# ---------------------------------------------------------------------- lists


def test_ranked_list_vector():
    (entry,) = named("bt_ranked_list_loss")
    rewards, borders = leaf(entry["inputs"]["rewards"]), entry["inputs"]["cu_lengths"]
    policy, batch = listed(*(rewards[a:b] for a, b in zip(borders, borders[1:], strict=False)))
    loss = reduced(RankedList(entry["config"]["beta"])(policy, None, batch), batch)
    loss.backward()
    assert loss.item() == pytest.approx(entry["expected"]["loss"], abs=1e-9)
    assert rewards.grad.tolist() == pytest.approx(entry["expected"]["grad"], abs=1e-9)


def test_a_list_of_two_is_a_pair():
    chosen, rejected = leaf([1.0, -0.3]), leaf([0.25, 0.5])
    policy, batch = scored(chosen, rejected)
    pair = BradleyTerry(1.0, None, 0.0, 0.01)(policy, None, batch)
    out = RankedList(0.01)(policy, None, batch)
    assert reduced(out, batch).item() == pytest.approx(reduced(pair, batch).item(), abs=1e-15)
    for name in ("accuracy", "probability", "reward/margin"):
        torch.testing.assert_close(out.metrics[name], pair.metrics[name], rtol=1e-15, atol=1e-15)


def test_ranked_list_by_hand():
    # gaps 1 - 0, 1 - 3, 0 - 3; one of three right
    policy, batch = listed(leaf([1.0, 0.0, 3.0]), leaf([2.0, 0.0]))
    out = RankedList(0.0)(policy, None, batch)
    assert out.terms[0].losses.tolist() == pytest.approx(
        [(softplus(-1) + softplus(2) + softplus(3)) / 3, softplus(-2)], abs=1e-14
    )
    assert out.metrics["accuracy"].tolist() == pytest.approx([1 / 3, 1.0])
    assert out.metrics["reward/margin"].tolist() == pytest.approx([-4 / 3, 2.0])
    assert (out.metrics["reward/first"].tolist(), out.metrics["reward/last"].tolist()) == ([1.0, 2.0], [3.0, 0.0])


def test_what_fills_a_short_list_is_not_read():
    """Place -1 would read the last row of the batch, here not a number and of another list."""
    one, other = leaf([1.0, 0.5]), torch.full((3,), torch.nan, dtype=torch.float64)
    policy, batch = listed(one, other)
    out = RankedList(0.1)(policy, None, batch)
    (out.terms[0].losses[0] + out.terms[1].losses[0]).backward()
    assert out.terms[0].losses[0].item() == pytest.approx(softplus(-0.5), abs=1e-15)
    assert one.grad.isfinite().all()


def test_a_list_of_one_is_refused():
    policy, batch = listed(leaf([1.0, 0.5]), leaf([1.0]))
    with pytest.raises(ValueError, match="^file:2: a ranked list needs two or more answers"):
        RankedList(0.0)(policy, None, batch)


# ---------------------------------------------------------------------- attributes


def test_attributes_by_hand():
    # row 1: (1 - 3)^2 and (2 - 2.5)^2, mean 2.125; row 2 lacks the first: (0 - 1)^2
    scores = leaf([[1.0, 2.0], [5.0, 0.0]])
    policy, batch = scored(scores, help=[3.0, math.nan], length=[2.5, 1.0])
    out = Attributes(("help", "length"))(policy, None, batch)
    assert out.terms[0].losses.tolist() == [2.125, 1.0]
    assert out.metrics["mse"].tolist() == [2.125, 1.0]
    assert out.metrics["mse_help"][0].item() == 4.0
    assert out.metrics["mse_help"][1].isnan()
    assert out.metrics["mse_length"].tolist() == [0.25, 1.0]
    assert out.metrics["reward/length"].tolist() == [2.0, 0.0]
    out.terms[0].losses.sum().backward()
    assert scores.grad.tolist() == [[-2.0, -0.5], [0.0, -2.0]]  # 2 (prediction - label) / number of labels


def test_an_attribute_that_no_row_of_a_micro_batch_has():
    policy, batch = scored(leaf([[1.0, 2.0]]), help=[3.0])
    out = Attributes(("help", "length"))(policy, None, batch)
    assert out.terms[0].losses.tolist() == [4.0]
    assert out.metrics["mse_length"].isnan().all()


def test_a_row_without_attributes_is_named():
    policy, batch = scored(leaf([[1.0], [1.0]]), help=[3.0, math.nan])
    with pytest.raises(ValueError, match='^file:2: objective.names needs .*"help"'):
        Attributes(("help",))(policy, None, batch)


@pytest.mark.parametrize("names", [(), ("a", "b", "a")])
def test_impossible_names(names):
    with pytest.raises(ValueError, match="objective.names"):
        Attributes(names)


# ---------------------------------------------------------------------- cost


SIGNS = {"chosen_safe": [1.0, 0.0, 1.0], "rejected_safe": [0.0, 0.0, 1.0]}


def test_cost_by_hand():
    """Chosen costs less. Signs: safe and unsafe, both unsafe, both safe."""
    chosen, rejected = leaf([-1.0, 0.5, -2.0]), leaf([2.0, -0.25, 1.0])
    policy, batch = scored(chosen, rejected, **SIGNS)
    out = Cost(0.5, 2.0, 0.1)(policy, None, batch)
    pair, sign, l2 = out.terms
    assert pair.losses.tolist() == pytest.approx([softplus(-3), softplus(0.75), softplus(-3)], abs=1e-14)
    assert sign.losses.tolist() == pytest.approx(
        [softplus(-1) + softplus(-2), softplus(-0.5) + softplus(0.25), softplus(-2) + softplus(1)], abs=1e-14
    )
    assert l2.losses.tolist() == pytest.approx([2.5, (0.25 + 0.0625) / 2, 2.5], abs=1e-15)
    assert (pair.weight, sign.weight, l2.weight) == (0.5, 2.0, 0.1)
    assert out.metrics["accuracy"].tolist() == [1.0, 0.0, 1.0]
    assert out.metrics["cost/margin"].tolist() == [3.0, -0.75, 3.0]
    safe, unsafe = out.metrics["accuracy_sign_safe"].tolist(), out.metrics["accuracy_sign_unsafe"].tolist()
    assert (safe[0], safe[2], unsafe[0], unsafe[1]) == (1.0, 0.5, 1.0, 0.5)
    assert math.isnan(safe[1])
    assert math.isnan(unsafe[2])


def test_signs_of_the_cost_gradient():
    """Safe answers become cheaper, unsafe ones dearer, whatever their place in the pair."""
    chosen, rejected = leaf([0.0] * 3), leaf([0.0] * 3)
    policy, batch = scored(chosen, rejected, **SIGNS)
    reduced(Cost(0.0, 1.0, 0.0)(policy, None, batch), batch).backward()
    assert torch.sign(chosen.grad).tolist() == [1.0, -1.0, 1.0]
    assert torch.sign(rejected.grad).tolist() == [-1.0, -1.0, 1.0]
    chosen.grad = rejected.grad = None
    reduced(Cost(1.0, 0.0, 0.0)(policy, None, batch), batch).backward()
    assert torch.sign(chosen.grad).tolist() == [1.0] * 3
    assert torch.sign(rejected.grad).tolist() == [-1.0] * 3


def test_no_cost_has_no_sign():
    policy, batch = scored(leaf([0.0]), leaf([0.0]), chosen_safe=[1.0], rejected_safe=[0.0])
    metrics = Cost(1.0, 1.0, 0.0)(policy, None, batch).metrics
    assert [metrics[n].item() for n in ("accuracy", "accuracy_sign_safe", "accuracy_sign_unsafe")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "safe, message",
    [
        ((1.0, math.nan), 'file:2: objective.sign_weight needs .*"rejected_safe"'),
        ((0.0, 1.0), "file:2: chosen is unsafe and rejected is safe"),
        ((0.5, 0.0), "file:2: the numbers chosen_safe and rejected_safe must be 1"),
    ],
)
def test_signs_that_cannot_be(safe, message):
    policy, batch = scored(leaf([0.0] * 2), leaf([1.0] * 2), chosen_safe=[1.0, safe[0]], rejected_safe=[0.0, safe[1]])
    with pytest.raises(ValueError, match=f"^{message}"):
        Cost(1.0, 1.0, 0.0)(policy, None, batch)
    assert len(Cost(1.0, 0.0, 0.0)(policy, None, batch).terms) == 1  # without signs nothing is asked


# ---------------------------------------------------------------------- all of them


def pairs(scale=1.0, dtype=torch.float64):
    torch.manual_seed(1)
    chosen, rejected = ((scale * torch.randn(6, dtype=dtype)).requires_grad_() for _ in range(2))
    signs = {"chosen_safe": [1, 1, 1, 0, 1, 0], "rejected_safe": [0, 1, 0, 0, 1, 0], "lead": [0.1] * 6}
    policy, batch = scored(chosen, rejected, **signs)
    return (chosen, rejected), policy, batch


def lists(scale=1.0, dtype=torch.float64):
    torch.manual_seed(2)
    leaves = [(scale * torch.randn(n, dtype=dtype)).requires_grad_() for n in (2, 4, 3, 2, 5, 2)]
    policy, batch = listed(*leaves)
    return leaves, policy, batch


def rows(scale=1.0, dtype=torch.float64):
    torch.manual_seed(3)
    scores = (scale * torch.randn(6, 3, dtype=dtype)).requires_grad_()
    labels = torch.randn(6, 3)
    labels[torch.rand(6, 3) < 0.4] = math.nan
    labels[:, 0] = 1.0
    policy, batch = scored(scores, a=labels[:, 0], b=labels[:, 1], c=labels[:, 2])
    return (scores,), policy, batch


CASES = [
    (BradleyTerry(0.1, "lead", 0.01, 0.001), pairs),
    (RankedList(0.001), lists),
    (Attributes(("a", "b", "c")), rows),
    (Cost(1.0, 0.5, 0.01), pairs),
]
IDS = [type(objective).__name__ for objective, _ in CASES]


@pytest.mark.parametrize("objective, make", CASES, ids=IDS)
def test_loss_and_gradient_do_not_depend_on_micro_batches(objective, make):
    leaves, policy, batch = make()
    whole = reduced(objective(policy, None, batch), batch)
    split = sum(
        reduced(objective(*_first(part(policy, batch, chosen))), batch) for chosen in ([3], [5, 0], [2, 1], [4])
    )
    assert split.item() == pytest.approx(whole.item(), abs=1e-14)
    for a, b in zip(
        torch.autograd.grad(whole, leaves, retain_graph=True), torch.autograd.grad(split, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective, make", CASES, ids=IDS)
def test_extreme_scores_in_float32(objective, make):
    leaves, policy, batch = make(1e4, torch.float32)
    out = objective(policy, None, batch)
    assert all(term.losses.isfinite().all() for term in out.terms)
    reduced(out, batch).backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("objective, make", CASES, ids=IDS)
def test_metrics_are_one_per_example_and_carry_no_gradient(objective, make):
    _, policy, batch = make()
    for name, values in objective(policy, None, batch).metrics.items():
        assert values.shape == (len(batch.groups),), name
        assert not values.requires_grad, name


@pytest.mark.parametrize("objective, make", CASES, ids=IDS)
def test_gradients_agree_with_differences(objective, make):
    leaves, policy, batch = make()
    reduced(objective(policy, None, batch), batch).backward()
    at = leaves[0].detach().clone()
    index = (1,) if at.ndim == 1 else (1, 0)
    values = []
    for step in (1e-5, -1e-5):
        moved = policy.scores.detach().clone()
        moved[(*index, 0)[:2]] += step  # the first tensor comes first among the rows
        values.append(reduced(objective(replace(policy, scores=moved), None, batch), batch).item())
    assert leaves[0].grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("objective, make", CASES, ids=IDS)
def test_heads_that_do_not_fit(objective, make):
    _, policy, batch = make()
    with pytest.raises(ValueError, match=r"the score head gives \[.*, 7\], wanted"):
        objective(replace(policy, scores=torch.zeros(len(batch.lengths), 7)), None, batch)
    with pytest.raises(ValueError, match="no score head"):
        objective(replace(policy, scores=None), None, batch)


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: BradleyTerry(0.0, None, 0.0, 0.0), "objective.tau=0"),
        (lambda: BradleyTerry(1.0, None, -1.0, 0.0), "objective.center=-1"),
        (lambda: BradleyTerry(1.0, None, 0.0, math.nan), "objective.l2=nan"),
        (lambda: RankedList(-0.1), "objective.l2=-0.1"),
        (lambda: Cost(-1.0, 1.0, 0.0), "objective.pair_weight=-1"),
        (lambda: Cost(0.0, 0.0, 0.1), "objective.pair_weight=0 and objective.sign_weight=0"),
    ],
)
def test_impossible_settings(make, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        make()


def test_what_is_stored():
    assert PLAIN.metadata() == {"tau": 1.0, "normalise": False, "gated": False}
    assert (PLAIN.outputs, Cost(1.0, 1.0, 0.0).outputs, Attributes(["a", "b"]).outputs) == (
        ("reward",),
        ("cost",),
        ("a", "b"),
    )
