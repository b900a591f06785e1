"""PAL: the reference's numbers without its errors, the head and its users, two groups of raters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from align.objectives import pal, pal_head
from align.objectives.pal import PAL, fit_user, head_of
from tests.objectives.build import reduced
from tests.objectives.scored import leaf, named, part, scored

TOLERANCE = 1e-6  # the reference holds the scale of the cosine in float32
DISTANCE = PAL(3, 2, 4, 1, "projected_mixture", "distance", 1.0)
ANGLE = PAL(3, 2, 4, 1, "mixture_of_projections", "angle", None)


def projector(weights: dict) -> nn.Sequential:
    """The reference's projector of a vector, in float64."""
    tensors = {name.removeprefix("mlp.layers."): leaf(values).detach() for name, values in weights.items()}
    dim, width = tensors["0.weight"].shape
    module = pal_head.projector(width, dim, len(tensors) // 2 - 1).double()
    module.load_state_dict(tensors)
    return module


def read(entry: dict):
    """Embeddings of both sides [B, T, d], user logits [B, K], y as +1 where left is preferred, divergence, end."""
    given = entry["inputs"]
    f = projector(given["projector" if "projector" in given else "projector_f"])
    left, right = f(leaf(given["token_embeddings"]))
    logits = leaf([given["user_logits_W"][user] for user in given["uids"]])
    sign = [-1, 1] if -1 in given["y"] else [0, 1]
    prefers_left = torch.tensor([y == sign[0] for y in given["y"]])
    assert set(given["y"]) <= set(sign)
    spans = (torch.tensor(given["divergence"]), torch.tensor(given["end"]))
    return f, left, right, logits, torch.where(prefers_left, 1.0, -1.0)[:, None], spans


def close(actual: Tensor, expected) -> None:
    torch.testing.assert_close(actual.detach(), leaf(expected).detach(), rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------- vectors


def test_pal_a_distance_vector():
    (entry,) = [e for e in named("pal_a") if e["config"]["pref_learner_type"] == "dist"]
    wanted = entry["expected"]
    f, left, right, logits, sign, spans = read(entry)
    points = pal_head.ideal_points(f, leaf(entry["inputs"]["prototypes_P"]), logits, "projected_mixture")
    gaps = pal_head.distances(left, points) - pal_head.distances(right, points)
    close(left, wanted["left_embedding"])
    close(right, wanted["right_embedding"])
    close(logits.softmax(-1), wanted["user_weights"])
    close(points, wanted["user_ideal_point"])
    close(gaps, wanted["model_output"])
    for weighting in ("mean", "cumulative", "only_last"):
        losses = pal.span_losses(pal.hinge(-sign * gaps, 1.0), *spans, weighting)
        close(losses.mean(), wanted[f"loss_hinge_{weighting}"])
    right_side = (-sign * gaps > 0).double()
    close(pal.span_losses(right_side, *spans, "mean").mean(), wanted["accu_all_tokens"])


@pytest.mark.parametrize("name", ["pal_a_angle", "pal_b_angle"])
def test_angle_vectors(name):
    (entry,) = [e for e in named(name[:5]) if e["name"] == name]
    given, wanted = entry["inputs"], entry["expected"]
    f, left, right, logits, sign, spans = read(entry)
    if name == "pal_a_angle":
        points = pal_head.ideal_points(f, leaf(given["prototypes_P"]), logits, "mixture_of_projections")
    else:
        prompt = leaf(given["prompt_token_embeddings"])
        points = pal_head.prompt_points(nn.ModuleList(projector(g) for g in given["projectors_g"]), prompt, logits)
    close(points, wanted["user_ideal_point"])
    log_scale = torch.tensor(math.log(1 / 0.07))
    cosines = [pal_head.cosines(side, points, log_scale) for side in (left, right)]
    close(torch.stack(cosines, -1), wanted["model_output"])
    losses = -nn.functional.logsigmoid(sign * (cosines[0] - cosines[1]))
    for weighting in ("mean", "cumulative", "only_last"):
        close(pal.span_losses(losses, *spans, weighting).mean(), wanted[f"loss_ce_{weighting}"])


def test_smooth_hinge_vector():
    (entry,) = named("pal_smooth_hinge")
    gaps = leaf(entry["inputs"]["outputs"]) * leaf(entry["inputs"]["targets"])
    close(pal.smooth_hinge(gaps, entry["config"]["margin"], entry["config"]["gamma"]), entry["expected"]["loss"])


# ---------------------------------------------------------------------- parts


def test_points_by_token_do_not_mix_examples():
    """The reference broadcasts [B, T, d] against [B, 1, T, d]; here each example meets its own points."""
    torch.manual_seed(0)
    embeddings, points = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    whole = pal_head.distances(embeddings, points)
    assert whole.shape == (3, 5)
    for b in range(3):
        assert torch.equal(whole[b : b + 1], pal_head.distances(embeddings[b : b + 1], points[b : b + 1]))


def test_spans_by_hand():
    # row 1: 2, 3, 4 at weights 1/6, 2/6, 3/6; row 2: one token
    losses = torch.tensor([[9.0, 2, 3, 4, 9], [9, 9, 7, math.nan, math.inf]])
    spans = torch.tensor([1, 2]), torch.tensor([4, 3])
    assert pal.span_losses(losses, *spans, "mean").tolist() == [3.0, 7.0]
    assert pal.span_losses(losses, *spans, "only_last").tolist() == [4.0, 7.0]
    assert pal.span_losses(losses, *spans, "cumulative").tolist() == pytest.approx([20 / 6, 7.0])
    with pytest.raises(ValueError, match="a span without tokens"):
        pal.span_losses(losses, torch.tensor([1, 3]), spans[1], "mean")
    with pytest.raises(ValueError, match="weighting=last"):
        pal.span_losses(losses, *spans, "last")  # type: ignore[arg-type]


@pytest.mark.parametrize("gamma, margin", [(5.0, 1.0), (0.5, 2.0)])
def test_the_smooth_hinge_is_smooth(gamma, margin):
    at = leaf([margin - gamma - 1e-7, margin - gamma + 1e-7, margin - 1e-7, margin + 1e-7, margin - gamma - 3])
    losses = pal.smooth_hinge(at, margin, gamma)
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    assert at.grad.tolist() == pytest.approx([-1, -1, 0, 0, -1], abs=1e-6)


def test_the_scale_has_a_limit():
    assert pal_head.scale(torch.tensor(9.0)).item() == 100.0
    assert pal_head.scale(torch.tensor(0.0)).item() == 1.0


# ---------------------------------------------------------------------- objective


def test_distance_by_hand():
    """Users 2 and 0: differences of their own columns, 1.5 and -0.5."""
    chosen, rejected = leaf([[9.0, 9, -0.5], [-1, 9, 9]]), leaf([[0.0, 0, -2], [-0.5, 0, 0]])
    policy, batch = scored(chosen, rejected, user=[2, 0])
    out = DISTANCE(policy, None, batch)
    assert out.terms[0].losses.tolist() == [0.0, 1.5]
    assert out.metrics["accuracy"].tolist() == [1.0, 0.0]
    assert out.metrics["reward/margin"].tolist() == [1.5, -0.5]
    out.terms[0].losses.sum().backward()
    assert chosen.grad.tolist() == [[0.0] * 3, [-1.0, 0.0, 0.0]]
    assert rejected.grad.tolist() == [[0.0] * 3, [1.0, 0.0, 0.0]]


def test_angle_is_the_logistic_loss():
    policy, batch = scored(leaf([[0.0, 3.0, 0.0]]), leaf([[0.0, 1.0, 0.0]]), user=[1])
    assert ANGLE(policy, None, batch).terms[0].losses.item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-15)


@pytest.mark.parametrize(
    "user, message",
    [
        (math.nan, 'file:2: objective=pal needs .*"user"'),
        (3.0, "file:2: user 3 is none of 0 to 2"),
        (-1.0, "file:2: user -1 is none of 0 to 2"),
        (0.5, "file:2: user 0.5 is none of 0 to 2"),
    ],
)
def test_users_that_are_none(user, message):
    policy, batch = scored(*torch.zeros(2, 2, 3), user=[0, user])
    with pytest.raises(ValueError, match=f"^{message}"):
        DISTANCE(policy, None, batch)


@pytest.mark.parametrize("objective", [DISTANCE, ANGLE], ids=lambda o: o.comparison)
def test_loss_and_gradient_do_not_depend_on_micro_batches(objective):
    torch.manual_seed(0)
    leaves = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    policy, batch = scored(*leaves, user=[2, 0, 1, 1, 2])
    whole = reduced(objective(policy, None, batch), batch)
    parts = [part(policy, batch, examples) for examples in ([3], [0, 4], [2, 1])]
    split = sum(reduced(objective(stats, None, small), batch) for stats, small in parts)
    assert split.item() == pytest.approx(whole.item(), abs=1e-14)
    for a, b in zip(
        torch.autograd.grad(whole, leaves, retain_graph=True), torch.autograd.grad(split, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"num_users": 0}, "objective.num_users=0"),
        ({"num_layers": -1}, "objective.num_layers=-1"),
        ({"point": "mean"}, "objective.point=mean"),
        ({"comparison": "cosine"}, "objective.comparison=cosine"),
        ({"hinge_margin": None}, "objective.hinge_margin=None"),
        ({"hinge_margin": -1.0}, "objective.hinge_margin=-1"),
        ({"comparison": "angle"}, "objective.hinge_margin=1.0"),
    ],
)
def test_impossible_settings(changes, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        replace(DISTANCE, **changes)


# ---------------------------------------------------------------------- head


@pytest.mark.parametrize("comparison", ["distance", "angle"])
@pytest.mark.parametrize("point", ["projected_mixture", "mixture_of_projections", "mixture"])
def test_the_head_gives_each_user_the_reward_of_its_point(comparison, point):
    torch.manual_seed(0)
    objective = PAL(3, 2, 4, 1, point, comparison, 1.0 if comparison == "distance" else None)
    head = objective.make_head(6).double()
    hidden = torch.randn(5, 6, dtype=torch.float64)
    rewards = head(hidden)
    assert rewards.shape == (5, len(objective.outputs))
    f = head.projector(hidden)[:, None]  # [N, 1, d]: each answer as a sequence of one token
    for user in range(3):
        a = pal_head.ideal_points(head.projector, head.prototypes, head.user_logits[user : user + 1], point).expand(
            5, -1
        )
        one = -pal_head.distances(f, a) if comparison == "distance" else pal_head.cosines(f, a, head.log_scale)
        torch.testing.assert_close(rewards[:, user], one[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", [DISTANCE, ANGLE], ids=lambda o: o.comparison)
def test_a_saved_head_gives_the_same_rewards(objective):
    torch.manual_seed(0)
    head = objective.make_head(6)
    form = {"kind": objective.reward_kind, "outputs": list(objective.outputs)} | objective.metadata()
    again = head_of(form, 6)
    again.load_state_dict(head.state_dict())
    hidden = torch.randn(7, 6)
    assert torch.equal(head(hidden), again(hidden))


@pytest.mark.parametrize("objective", [DISTANCE, ANGLE], ids=lambda o: o.comparison)
def test_extreme_states_in_float32(objective):
    """Also an answer that lies exactly at the ideal point, where the distance has no derivative."""
    torch.manual_seed(0)
    head = objective.make_head(6)
    with torch.no_grad():
        head.user_logits[0] = torch.tensor([50.0, -50.0])  # user 0 is prototype 0
    chosen, rejected = 1e4 * torch.randn(2, 4, 6)
    chosen[0] = head.prototypes[0].detach()
    both = head(torch.cat([chosen, rejected]))
    policy, batch = scored(both[:4], both[4:], user=[0, 1, 2, 0])
    loss = reduced(objective(policy, None, batch), batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


# ---------------------------------------------------------------------- two groups of raters


def rated(num_users: int, num_pairs: int, seed: int):
    """Hidden states of chosen and rejected [U, n, 8] and users [U, n]: even users want more of one direction, odd less.

    The direction stands for length; the other seven carry nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, num_users, num_pairs, 8, generator=generator)
    users = torch.arange(num_users)[:, None].expand(-1, num_pairs)
    longer = one[..., 0] > other[..., 0]
    first = (longer == (users % 2 == 0))[..., None]
    return torch.where(first, one, other), torch.where(first, other, one), users


def accuracy(objective: PAL, head: nn.Module, pairs) -> float:
    chosen, rejected, users = (x.flatten(0, 1) for x in pairs)
    with torch.no_grad():
        policy, batch = scored(head(chosen), head(rejected), user=users)
        return objective(policy, None, batch).metrics["accuracy"].mean().item()


def trained(num_prototypes: int, comparison: str = "distance"):
    torch.manual_seed(0)
    margin = 1.0 if comparison == "distance" else None
    objective = PAL(10, num_prototypes, 8, 1, "projected_mixture", comparison, margin)
    head = objective.make_head(8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.0)
    pairs = rated(10, 60, seed=1)
    chosen, rejected, users = (x.flatten(0, 1) for x in pairs)
    for _ in range(200):
        policy, batch = scored(head(chosen), head(rejected), user=users)
        optimizer.zero_grad()
        objective(policy, None, batch).terms[0].losses.mean().backward()
        optimizer.step()
    return objective, head


def test_one_prototype_cannot_please_two_groups():
    objective, head = trained(1)
    assert 0.4 <= accuracy(objective, head, rated(10, 60, seed=2)) <= 0.6


@pytest.mark.parametrize("comparison", ["distance", "angle"])
def test_two_prototypes_please_both_and_a_new_user_is_known_from_five_pairs(comparison):
    objective, head = trained(2, comparison)
    assert accuracy(objective, head, rated(10, 60, seed=2)) >= 0.9
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    newcomers = rated(10, 205, seed=3)
    found, shares = [], []
    for user in range(10):
        chosen, rejected, _ = (x[user] for x in newcomers)
        found.append(fit_user(head, objective, chosen[:5], rejected[:5], lr=0.05, steps=100, weight_decay=0.0))
        rewards = [head.rewards(x[5:], found[-1][None])[:, 0] for x in (chosen, rejected)]
        shares.append((rewards[0] > rewards[1]).double().mean().item())
    assert sum(shares) / 10 >= 0.8  # one user may be missed: five pairs are few
    assert all(torch.equal(before[name], p) for name, p in head.named_parameters())
    number = head.add_user(found[1])
    assert number == 10
    states = newcomers[0][1]
    wide = head(states)
    assert wide.shape[1] == 11
    torch.testing.assert_close(wide[:, 10], head.rewards(states, found[1][None])[:, 0])
