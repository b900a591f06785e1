"""Objectives over pairs with a third sequence: the reason for the preference, written after prompt and both answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.deferred import F
from align.objectives.base import Objective
from align.objectives.checks import not_negative, one_of, positive_value
from align.objectives.imitation import nll_means, nll_term
from align.objectives.losses import BaseLoss, as_loss
from align.objectives.preference import pair_ratios, preference_metrics
from align.objectives.reference_free import Scope, log_odds_ratio, mean_metrics
from align.sums import positive
from align.types import Losses, PackedBatch, Stats, Term

_COLUMN = 2  # of groups: the rationale


@dataclass(frozen=True)
class RDPO(Objective):
    """A base loss on the pair plus a term on S, the log-prob (sum over tokens) of the rationale.

    variant code_logsigmoid: -log s(gamma S), what the authors' code computes; the weight of S in the gradient is
    gamma s(-gamma S), between gamma / 2 and gamma. variant nll: -gamma S, the paper's objective. gamma >= 0.
    beta, loss: as in DPO. Just et al. 2024, rationale-enriched preference learning, arXiv 2407.14477.
    """

    beta: float
    loss: BaseLoss
    gamma: float
    variant: Literal["code_logsigmoid", "nll"]

    kind = "pair"
    columns = ("rationale",)
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        as_loss(self.loss)
        not_negative("objective.gamma", self.gamma)
        one_of("objective.variant", self.variant, ("code_logsigmoid", "nll"))

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """The preference term [P] and the rationale's [P]; metrics are DPO's and rationale/nll, nats per token."""
        ratios = pair_ratios(policy, reference, batch)
        total = policy.logps[batch.groups[:, _COLUMN]]
        if self.variant == "nll":
            rationale = Term(-total, "example", self.gamma)
        else:
            rationale = Term(-F.logsigmoid(self.gamma * total), "example")
        metrics = preference_metrics(policy, ratios, batch, self.beta)
        metrics["rationale/nll"] = nll_means(policy, batch, _COLUMN).detach()
        return Losses((Term(self.loss(ratios, self.beta), "example"), rationale), metrics)


@dataclass(frozen=True)
class RORPO(Objective):
    """ORPO plus a term on the rationale's log-prob per token m.

    variant rorpo: NLL(chosen) - odds_weight log s(log odds ratio) - log s(gamma m);
    variant rorpo_simple: -gamma m in place of the last. gamma >= 0; odds_weight, nll_scope: as in ORPO.
    Just et al. 2024, arXiv 2407.14477, whose code takes the NLL over the completion.
    """

    odds_weight: float
    nll_scope: Scope
    gamma: float
    variant: Literal["rorpo", "rorpo_simple"]

    kind = "pair"

    def __post_init__(self) -> None:
        not_negative("objective.odds_weight", self.odds_weight)
        one_of("objective.nll_scope", self.nll_scope, ("whole", "completion"))
        not_negative("objective.gamma", self.gamma)
        one_of("objective.variant", self.variant, ("rorpo", "rorpo_simple"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The rationale and, where the NLL is over prompt and completion, the chosen row with both as targets."""
        return ("rationale", "chosen_whole") if self.nll_scope == "whole" else ("rationale",)

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """The rationale's term [P], the odds term [P], the NLL of chosen [targets of its column]."""
        rows = batch.groups[:, _COLUMN]
        mean = policy.logps[rows] / positive(policy.lengths)[rows]
        column = 3 if self.nll_scope == "whole" else 0
        nll = nll_term(policy, batch, 1.0, column)
        metrics = mean_metrics(policy, batch, self.odds_weight)
        metrics["nll"] = nll_means(policy, batch, column).detach()
        metrics["rationale/nll"] = -mean.detach()
        if self.variant == "rorpo":
            rationale = Term(-F.logsigmoid(self.gamma * mean), "example")
        else:
            rationale = Term(-mean, "example", self.gamma)
        ratio = log_odds_ratio(policy, batch)
        metrics["odds/log_ratio"] = ratio.detach()
        odds = Term(-F.logsigmoid(ratio), "example", self.odds_weight)
        return Losses((rationale, odds, nll), metrics)
