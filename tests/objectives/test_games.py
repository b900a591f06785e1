"""What an objective does when it is minimised: an intransitive game on three actions with exact probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from align.objectives.losses import Sigmoid
from align.objectives.preference import INPO
from align.packing import with_extras
from tests.conftest import plain_dpo
from tests.objectives.build import batch_of, stats_of

# Rock, paper, scissors: action i beats i + 1 nine times in ten. The Nash policy is uniform.
BEATS = torch.full((3, 3), 0.5, dtype=torch.float64)
for i in range(3):
    BEATS[i, (i + 1) % 3], BEATS[(i + 1) % 3, i] = 0.9, 0.1
CHOSEN, REJECTED = (BEATS * (1 - torch.eye(3))).nonzero().T
BATCH = batch_of(torch.arange(12), 12)
FIRST = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()


def minimised(objective, start: Tensor, reference: Tensor) -> Tensor:
    """Log-probs [3] of the policy with the least expected loss over pairs of samples from `start`."""
    both = torch.cat([CHOSEN, REJECTED])
    batch = with_extras(BATCH, {"start_token_logps": start[both]})
    anchor = stats_of(reference[both], batch)
    weights = (start[CHOSEN] + start[REJECTED]).exp() * BEATS[CHOSEN, REJECTED]
    logits = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-15
    )

    def closure() -> Tensor:
        search.zero_grad()
        policy = stats_of(logits.log_softmax(0)[both], batch)
        loss = (objective(policy, anchor, batch).terms[0].losses * weights).sum() / weights.sum()
        loss.backward()
        return loss

    search.step(closure)
    return logits.detach().log_softmax(0)


def distance_to_nash(policy: Tensor) -> float:
    return float((policy.exp() - 1 / 3).abs().sum())


def test_one_step_of_inpo_is_mirror_descent():
    """log pi' = P(y beats pi) / eta + tau/eta log reference + (1 - tau/eta) log pi, up to a constant."""
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    found = minimised(INPO(2.0, 0.5), FIRST, reference)
    expected = (BEATS @ FIRST.exp() / 2.0 + 0.25 * reference + 0.75 * FIRST).log_softmax(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_inpo_reaches_the_nash_policy_near_the_reference_and_dpo_does_not():
    """Both are iterated from the same policy; DPO, each time with the last policy as reference, chases the winner."""
    inpo, dpo = FIRST, FIRST
    for _ in range(120):
        inpo = minimised(INPO(1.0, 0.1), inpo, FIRST)
    for _ in range(30):
        dpo = minimised(plain_dpo(1.0, Sigmoid(0.0)), dpo, dpo)
    # the policy that is the best answer to itself, less 0.1 KL to the reference
    answer = (FIRST + BEATS @ inpo.exp() / 0.1).log_softmax(0)
    assert (answer - inpo).abs().max() < 0.01
    assert distance_to_nash(inpo) < 0.5 * distance_to_nash(FIRST)
    assert distance_to_nash(dpo) > 1.5 * distance_to_nash(FIRST)
