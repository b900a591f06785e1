"""Preferences between the nodes of a search tree: MCTS-DPO, and how sure visit counts make them."""

from __future__ import annotations

from dataclasses import dataclass

from align.deferred import Tensor
from align.objectives.base import Objective
from align.objectives.checks import needed_number, not_negative, positive_value
from align.objectives.losses import smoothed_logistic
from align.objectives.preference import pair_ratios, preference_metrics
from align.types import Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class MCTSDPO(Objective):
    """-(1 - e) log s(z) - e log s(-z) on two continuations of one path of a search tree, e by pair.

    z = beta (chosen / |chosen|^p - rejected / |rejected|^p), log-ratios and token counts of the part in which the two
    differ (data.targets=divergent), p = length_penalty >= 0, 0 is off. conservative: e is the number label_smoothing
    of the pair (data.search.label_smoothing, from visits), else 0.
    Xie et al. 2024, MCTS-DPO, arXiv 2405.00451.
    """

    beta: float
    length_penalty: float
    conservative: bool

    kind = "pair"
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        not_negative("objective.length_penalty", self.length_penalty)

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P]; metrics are DPO's on the same sums, before the length penalty."""
        ratios = pair_ratios(policy, reference, batch)
        chosen = ratios.chosen / ratios.chosen_lengths**self.length_penalty
        rejected = ratios.rejected / ratios.rejected_lengths**self.length_penalty
        smoothing: float | Tensor = 0.0
        if self.conservative:
            smoothing = needed_number(batch, "label_smoothing", "objective.conservative=true").to(chosen.dtype)
        losses = smoothed_logistic(self.beta * (chosen - rejected), smoothing)
        return Losses((Term(losses, "example"),), preference_metrics(policy, ratios, batch, self.beta))
