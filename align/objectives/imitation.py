"""Maximum likelihood of given answers: supervised fine-tuning, and the term that other objectives add."""

from __future__ import annotations

from dataclasses import dataclass

from align.deferred import Tensor, torch
from align.objectives.base import Objective
from align.sums import positive
from align.types import Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class NLL(Objective):
    """-log p of every target of the first sequence of each example, one mean over all tokens of a step.

    Supervised fine-tuning; on pairs, in a mix, it imitates chosen. A target counts as much as its weight.
    """

    kind = "single"

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """One term with a loss per target of column 0; metric nll [P], nats per token of each sequence."""
        return Losses((nll_term(policy, batch, 1.0),), {"nll": nll_means(policy, batch).detach()})


def nll_term(policy: Stats, batch: PackedBatch, weight: float, column: int = 0) -> Term:
    """-log p times the target's weight for the targets of a column; the loop divides by their weights' sum."""
    losses = -policy.token_logps
    if batch.target_weights is not None:
        losses = losses * batch.target_weights
    # 0, not left out: how many there are would have to be read from the device
    losses = torch.where(torch.isin(batch.row, batch.groups[:, column]), losses, torch.zeros_like(losses))
    return Term(losses, "token", weight, column)


def nll_means(policy: Stats, batch: PackedBatch, column: int = 0) -> Tensor:
    """-log p per token [P] of the sequences of a column; 0 for one without targets."""
    rows = batch.groups[:, column]
    return -policy.logps[rows] / positive(policy.lengths)[rows]
