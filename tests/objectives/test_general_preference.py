"""The general preference model: the reference's numbers, antisymmetry, a cycle that a reward cannot express."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from align.objectives.general_preference import GeneralPreference, gpo_loss, mean_scores, score_table, skew_score
from align.objectives.reward_model import BradleyTerry
from align.types import Extras
from tests.objectives.build import reduced
from tests.objectives.scored import leaf, named, part, scored


def plain(dim: int, tau: float = 1.0, **changes) -> GeneralPreference:
    return GeneralPreference(**{"dim": dim, "tau": tau, "normalise": False, "gated": False, "margin": None} | changes)


def random_pairs(num, dim, seed=0, scale=1.0, dtype=torch.float64):
    torch.manual_seed(seed)
    return tuple((scale * torch.randn(num, dim, dtype=dtype)).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("entry", named("gpm_loss"), ids=lambda e: e["name"])
def test_vectors(entry):
    config, given, wanted = entry["config"], entry["inputs"], entry["expected"]
    chosen, rejected = leaf(given["v_chosen"]), leaf(given["v_rejected"])
    numbers = {} if given["margin"] is None else {"lead": given["margin"]}
    objective = plain(config["dim"], config["tau"], margin="lead" if numbers else None)
    policy, batch = scored(chosen, rejected, **numbers)
    out = objective(policy, None, batch)
    loss = reduced(out, batch)
    loss.backward()
    assert loss.item() == pytest.approx(wanted["loss"], abs=1e-9)
    torch.testing.assert_close(chosen.grad, leaf(wanted["grad_chosen"]).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rejected.grad, leaf(wanted["grad_rejected"]).detach(), rtol=1e-9, atol=1e-9)
    assert out.metrics["reward/margin"].tolist() == pytest.approx(wanted["score"], abs=1e-9)
    assert (-out.terms[0].losses).exp().mean().item() == pytest.approx(wanted["prob_mean"], abs=1e-9)
    assert skew_score(rejected, chosen).tolist() == pytest.approx(wanted["score_swapped"], abs=1e-9)
    unit = replace(objective, normalise=True)(policy, None, batch)
    assert unit.metrics["reward/margin"].tolist() == pytest.approx(wanted["score_normalised"], abs=1e-9)


def test_gate_vector():
    (entry,) = named("gpm_prompt_gated_score")
    given, wanted = entry["inputs"], entry["expected"]
    gates = leaf(given["prompt_hidden"]) @ leaf(given["prompt_head_weight"]).T
    policy, batch = scored(leaf(given["v_chosen"]), leaf(given["v_rejected"]), gates=gates.detach())
    out = plain(4, gated=True)(policy, None, batch)
    assert out.metrics["reward/margin"].tolist() == pytest.approx(wanted["score"], abs=1e-9)
    torch.testing.assert_close(gates.softmax(-1).detach(), leaf(wanted["block_gates"]).detach(), rtol=0, atol=1e-9)
    assert out.metrics["gate/max"].tolist() == pytest.approx([max(row) for row in wanted["block_gates"]], abs=1e-9)


def test_table_vectors():
    ranked, cycle = named("gpm_score_table")
    for entry in (ranked, cycle):
        table = score_table(leaf(entry["inputs"]["embeddings"])).detach()
        torch.testing.assert_close(table, leaf(entry["expected"]["table"]).detach(), rtol=0, atol=1e-9)
    means = mean_scores(score_table(leaf(ranked["inputs"]["embeddings"])))
    # their ranker subtracts the transposed table, and its probabilities are those of twice the score
    assert (2 * means).tolist() == pytest.approx(ranked["expected"]["row_score_used_for_gpo"], abs=1e-9)
    assert (2 * means).tolist() == pytest.approx(ranked["expected"]["mean_score_float32"], abs=1e-6)
    table = score_table(leaf(ranked["inputs"]["embeddings"])).detach()
    torch.testing.assert_close((2 * table).sigmoid(), leaf(ranked["expected"]["prob"]).detach(), rtol=0, atol=1e-9)
    means = mean_scores(score_table(leaf(cycle["inputs"]["embeddings"])))
    assert means.tolist() == pytest.approx(cycle["expected"]["row_mean"], abs=1e-9)


def test_gpo_vector():
    (entry,) = named("gpo_loss")
    log_ratios = leaf(entry["inputs"]["logratio"])
    loss = gpo_loss(log_ratios, leaf(entry["inputs"]["score"]), entry["config"]["beta"]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(entry["expected"]["loss"], rel=1e-12)
    assert log_ratios.grad.tolist() == pytest.approx(entry["expected"]["grad_logratio"], abs=1e-9)


def test_by_hand():
    # 1 * 4 - 2 * 3 + 0.5 (5 * 8 - 6 * 7) = -3
    score = skew_score(leaf([1.0, 2, 5, 6]), leaf([3.0, 4, 7, 8]), torch.tensor([1.0, 0.5]))
    assert score.item() == -3.0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_exchanged_answers_have_the_negative_score_bit_for_bit(gated, normalise):
    a, b = random_pairs(40, 6)
    gates = torch.randn(40, 3, dtype=torch.float64) if gated else None
    objective = plain(6, 0.1, normalise=normalise, gated=gated)
    one, other = (objective(*_parts(scored(*x, gates=gates))).metrics for x in ((a, b), (b, a)))
    assert torch.equal(one["reward/margin"], -other["reward/margin"])
    assert (one["accuracy"] + other["accuracy"]).tolist() == [1.0] * 40
    torch.testing.assert_close(one["probability"], 1 - other["probability"], rtol=0, atol=1e-15)
    table = score_table(a.detach())
    assert torch.equal(table, -table.T)


def _parts(given):
    policy, batch = given
    return policy, None, batch


def test_the_same_answer_twice_is_a_tie_and_wrong():
    a, _ = random_pairs(3, 4)
    metrics = plain(4)(*_parts(scored(a, a))).metrics
    assert metrics["reward/margin"].tolist() == [0.0] * 3
    assert metrics["accuracy"].tolist() == [0.0] * 3


def test_bradley_terry_is_a_special_case():
    """Embeddings (r, 1) give r(chosen) - r(rejected)."""
    chosen, rejected = leaf([1.0, -0.5]), leaf([0.25, 2.0])
    pair = BradleyTerry(0.3, "lead", 0.0, 0.0)
    wide = plain(2, 0.3, margin="lead")
    both = [torch.stack([r, torch.ones_like(r)], 1) for r in (chosen, rejected)]
    a = pair(*_parts(scored(chosen, rejected, lead=[0.5, 0.1])))
    b = wide(*_parts(scored(*both, lead=[0.5, 0.1])))
    torch.testing.assert_close(a.terms[0].losses, b.terms[0].losses, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(a.metrics["probability"], b.metrics["probability"], rtol=1e-14, atol=0)


def test_rotating_both_answers_of_a_block_changes_nothing():
    """The form is a signed area, which rotations keep."""
    a, b = random_pairs(5, 2)
    c, s = math.cos(0.7), math.sin(0.7)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    torch.testing.assert_close(skew_score(a @ turn.T, b @ turn.T), skew_score(a, b), rtol=1e-12, atol=1e-14)


def test_normalised_scores_do_not_see_lengths():
    a, b = random_pairs(4, 4)
    scores = [plain(4, 0.1, normalise=True)(*_parts(scored(k * a, b))).metrics["reward/margin"] for k in (1.0, 1000.0)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-12, atol=0)
    assert (scores[0].abs() <= 1).all()


def test_an_embedding_of_zero():
    """Before the first step a head may give 0: no direction, no opinion, and a finite gradient."""
    chosen, rejected = leaf([[0.0, 0.0]]), leaf([[1.0, 1.0]])
    out = plain(2, 0.1, normalise=True)(*_parts(scored(chosen, rejected)))
    out.terms[0].losses.sum().backward()
    assert out.terms[0].losses.item() == pytest.approx(math.log(2), abs=1e-15)
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


def test_gates_learn():
    """Blocks score 1 and -1: the gate moves weight to the block that is right."""
    gates = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    policy, batch = scored(leaf([[1.0, 0, 1, 0]]), leaf([[0.0, 1, 0, -1]]), gates=gates)
    plain(4, gated=True)(policy, None, batch).terms[0].losses.sum().backward()
    assert gates.grad[0, 0] < 0 < gates.grad[0, 1]
    with pytest.raises(ValueError, match="gates is not among the extras"):
        plain(4, gated=True)(replace(policy, extras=Extras()), None, batch)


@pytest.mark.parametrize("objective", [plain(4, 0.1), plain(4, normalise=True), plain(4, gated=True, margin="lead")])
def test_loss_and_gradient_do_not_depend_on_micro_batches(objective):
    leaves = random_pairs(6, 4)
    policy, batch = scored(*leaves, gates=torch.randn(6, 2, dtype=torch.float64), lead=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    whole = reduced(objective(policy, None, batch), batch)
    split = sum(reduced(objective(*_parts(part(policy, batch, p))), batch) for p in ([3], [5, 0], [2, 1, 4]))
    assert split.item() == pytest.approx(whole.item(), abs=1e-13)
    for a, b in zip(
        torch.autograd.grad(whole, leaves, retain_graph=True), torch.autograd.grad(split, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalise", [False, True])
def test_extreme_embeddings_in_float32(normalise):
    leaves = random_pairs(6, 4, scale=1e4, dtype=torch.float32)
    policy, batch = scored(*leaves)
    loss = reduced(plain(4, 0.1, normalise=normalise)(policy, None, batch), batch)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_what_is_stored_and_needed():
    objective = plain(4, 0.1, normalise=True, gated=True)
    assert objective.metadata() == {"tau": 0.1, "normalise": True, "gated": True}
    assert (objective.needs, objective.extras) == ({"scores"}, {"gates"})
    assert plain(4).extras == frozenset()
    assert objective.outputs == ("embedding_0", "embedding_1", "embedding_2", "embedding_3")


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_odd_sizes_are_refused(dim):
    with pytest.raises(ValueError, match=f"^objective.dim={dim}: must be an even number"):
        plain(dim)


def rock_paper_scissors(num, seed):
    """Hidden states [num, 8] of the winners and the losers: which of three kinds they are, and noise."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(3, (num,), generator=generator)
    noise = 0.15 * torch.randn(2, num, 8, generator=generator)
    one_hot = torch.eye(8)[torch.stack([kinds, (kinds + 1) % 3])]  # each kind beats the next
    winners, losers = one_hot + noise
    return winners, losers


@pytest.mark.parametrize(
    "objective, low, high",
    [(BradleyTerry(1.0, None, 0.0, 0.0), 0.4, 0.6), (plain(2), 0.98, 1.0)],
    ids=["bradley_terry", "general_preference"],
)
def test_a_cycle_of_preferences(objective, low, high):
    """A linear head on the same states: a reward orders three kinds and is right as often as a coin; dim 2 suffices."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, len(objective.outputs), bias=False)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    train, test = rock_paper_scissors(600, 1), rock_paper_scissors(600, 2)
    for _ in range(150):
        policy, batch = scored(*(head(x) for x in train))
        optimizer.zero_grad()
        objective(policy, None, batch).terms[0].losses.mean().backward()
        optimizer.step()
    accuracy = objective(*_parts(scored(*(head(x).detach() for x in test)))).metrics["accuracy"].mean().item()
    assert low <= accuracy <= high
