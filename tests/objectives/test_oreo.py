"""OREO against the reference implementation, its fixed point on a tree, and the objective on packed rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.objectives.oreo import (
    OREO,
    policy_losses,
    single_step_losses,
    states_of,
    trajectory_losses,
    value_losses,
)
from tests.objectives.build import batch_of, stats_of

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "online_public.json").read_text())
ENTRIES = [e for e in VECTORS if e["algorithm"] == "oreo"]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_vectors(entry):
    c, given, expected = entry["config"], entry["inputs"], entry["expected"]
    logps, values = f64(given["logps"]).requires_grad_(), f64(given["values"]).requires_grad_()
    # column t of the log-probs and values is about token t + 1
    mask = torch.tensor(given["action_mask"])[:, 1:].bool()
    starts = torch.tensor(given["state_mask"])[:, :-1].bool()[mask]
    row = mask.nonzero()[:, 0]
    states = states_of(row, len(mask), starts)
    log_ratio = (logps - f64(given["ref_logps"]))[mask]
    shared = (log_ratio, values[mask], f64(given["reward"]), states, c["beta"])
    if c["loss"] == "value":
        losses = value_losses(*shared, c["clip_log"])
    elif c["loss"] == "policy":
        losses = policy_losses(*shared, c["clip_log"])
    elif c["loss"] == "traj":
        losses = trajectory_losses(*shared)
    else:
        behind = mask.long().cumsum(1).argmax(1) + 1
        after = None if c["step_level"] else values[torch.arange(len(mask)), behind]
        losses = single_step_losses(*shared, after)
    loss = losses.mean()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-10)
    gradients = torch.autograd.grad(loss, (logps, values), allow_unused=True, materialize_grads=True)
    for gradient, name in zip(gradients, ("grad_logps", "grad_values"), strict=True):
        torch.testing.assert_close(gradient, f64(expected[name]), rtol=1e-10, atol=1e-15)


def test_steps_by_hand():
    # one row of four tokens, steps begin at the second and the fourth; the first token belongs to no step
    x = f64([9.0, 1.0, 2.0, 4.0]).requires_grad_()
    states = states_of(torch.zeros(4, dtype=torch.long), 1, torch.tensor([False, True, False, True]))
    v, rewards = f64([7.0, 0.5, 7.0, 0.25]).requires_grad_(), f64([1.0])
    # D = 7 at the first step, 4 at the second
    assert value_losses(x, v, rewards, states, 0.5, None).tolist() == [(3.0**2 + 1.25**2) / 2]
    assert value_losses(x, v, rewards, states, 0.5, 5.0).tolist() == [(2.0**2 + 1.25**2) / 2]
    losses = policy_losses(x, v, rewards, states, 0.5, None)
    assert losses.tolist() == [(3.0**2 + 1.25**2) / 2]
    # d/dx = beta * residual for the tokens of the step; nothing to the values
    gradients = torch.autograd.grad(losses.sum(), (x, v), allow_unused=True)
    assert gradients[0].tolist() == [0.0, 1.5, 1.5, 0.625]
    assert gradients[1] is None
    # 0.5 * 3 + 0.5 - 0.25 and 0.5 * 4 + 0.25 - 1
    assert single_step_losses(x, v, rewards, states, 0.5).tolist() == [(1.75**2 + 1.25**2) / 2]
    assert trajectory_losses(x, v, rewards, states, 0.5).tolist() == [9.0]


def problem(values=((-0.5, -1.0), (-2.0,), (), (-0.1, -0.2, -0.3))):
    row = torch.tensor([i for i, r in enumerate(values) for _ in r])
    batch = batch_of(row, len(values), 1, numbers={"reward": torch.tensor([1.0, 0.0, 1.0, 0.5])})
    logps = f64([v for r in values for v in r]).requires_grad_()
    head = torch.linspace(-1, 1, len(row), dtype=torch.float64).requires_grad_()
    reference = stats_of(torch.linspace(-1, -0.5, len(row), dtype=torch.float64), batch)
    return logps, head, stats_of(logps, batch, values=head), reference, batch


def test_the_objective_is_both_losses_with_gradients_that_do_not_mix():
    logps, head, policy, reference, batch = problem()
    out = OREO(0.3, None, 2.0)(policy, reference, batch)
    log_ratio = logps - reference.token_logps
    states = states_of(batch.row, 4)
    rewards = f64([1.0, 0.0, 1.0, 0.5])
    shared = (log_ratio, head, rewards, states, 0.3, None)
    assert [t.unit for t in out.terms] == ["row", "row"]
    loss = sum(t.weight * t.losses.sum() for t in out.terms)
    a = torch.autograd.grad(loss, (logps, head), retain_graph=True)
    torch.testing.assert_close(a[0], torch.autograd.grad(policy_losses(*shared).sum(), logps, retain_graph=True)[0])
    torch.testing.assert_close(a[1], 2 * torch.autograd.grad(value_losses(*shared).sum(), head)[0])
    # the third row has no targets: no loss, no metric
    assert out.terms[0].losses[2] == out.terms[1].losses[2] == 0
    assert all(values.isnan().tolist() == [False, False, True, False] for values in out.metrics.values())
    assert out.metrics["oreo/value"][[0, 1, 3]].tolist() == head.detach()[[0, 2, 3]].tolist()


def test_rows_need_a_reward():
    _, _, policy, reference, batch = problem()
    with pytest.raises(ValueError, match=r'file:1: objective oreo needs .*"reward"'):
        OREO(0.3, None, 1.0)(policy, reference, replace(batch, numbers={}))


def test_huge_log_ratios_stay_finite():
    logps, head, _, reference, batch = problem()
    extreme = (logps * 1e3).float()
    reference = stats_of(reference.token_logps.float(), batch)
    out = OREO(0.3, None, 1.0)(stats_of(extreme, batch, values=head.float()), reference, batch)
    loss = sum(t.losses.sum() for t in out.terms)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logps)[0].isfinite().all()


def test_fixed_point_on_a_tree():
    # Two tokens of two kinds, four completions with rewards 1, 0, 0, 0.5, uniform reference and data. The optimum:
    # V(s) = beta log mean exp(R / beta) below s, policy = reference * exp((V(s') - V(s)) / beta).
    beta, rewards = 0.5, f64([1.0, 0.0, 0.0, 0.5])
    logits = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)  # at the root, after 0, after 1
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    node = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]]).reshape(-1)
    token = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).reshape(-1)
    row = torch.arange(4).repeat_interleave(2)
    batch = batch_of(row, 4, 1, numbers={"reward": rewards})
    reference = stats_of(torch.full((8,), -math.log(2), dtype=torch.float64), batch)
    optimizer = torch.optim.Adam([logits, v], 0.05)
    for _ in range(800):
        policy = stats_of(logits.log_softmax(1)[node, token], batch, values=v[node])
        out = OREO(beta, None, 1.0)(policy, reference, batch)
        optimizer.zero_grad()
        sum(t.losses.mean() for t in out.terms).backward()
        optimizer.step()
    e = (rewards / beta).exp()
    soft = beta * torch.stack([e.mean(), e[:2].mean(), e[2:].mean()]).log()
    torch.testing.assert_close(v.detach(), soft, rtol=0, atol=1e-3)
    best = torch.stack([(soft[1:] - soft[0]) / beta, (rewards[:2] - soft[1]) / beta, (rewards[2:] - soft[2]) / beta])
    torch.testing.assert_close(logits.detach().softmax(1), 0.5 * best.exp(), rtol=0, atol=1e-3)
