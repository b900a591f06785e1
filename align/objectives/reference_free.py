"""Objectives over pairs that need no reference: SimPO and ORPO, both on log-probs per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.deferred import Tensor, torch
from align.objectives.base import Objective
from align.objectives.checks import not_negative, one_of, positive_value
from align.objectives.imitation import nll_means, nll_term
from align.objectives.losses import BaseLoss, Ratios
from align.objectives.preference import needs_difference
from align.sums import positive
from align.types import Losses, PackedBatch, Stats, Term

Scope = Literal["whole", "completion"]


@dataclass(frozen=True)
class SimPO(Objective):
    """A base loss of z = beta (chosen - rejected - gamma_beta_ratio), both log-probs per token, without reference.

    beta > 0; gamma_beta_ratio >= 0: by how much chosen is to lead, in nats per token. TRL's CPO trainer gives the
    margin as gamma = beta * gamma_beta_ratio. loss: of the difference only; the paper's is sigmoid.
    Meng et al. 2024, SimPO, arXiv 2405.14734.
    """

    beta: float
    gamma_beta_ratio: float
    loss: BaseLoss

    kind = "pair"

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        not_negative("objective.gamma_beta_ratio", self.gamma_beta_ratio)
        needs_difference(self.loss, "SimPO")

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """Losses [P]; rewards in the metrics are beta times the log-prob per token."""
        chosen, rejected = mean_logps(policy, batch)
        ones = torch.ones_like(chosen)
        losses = self.loss(Ratios(chosen - self.gamma_beta_ratio, rejected, ones, ones), self.beta)
        return Losses((Term(losses, "example"),), mean_metrics(policy, batch, self.beta))


@dataclass(frozen=True)
class ORPO(Objective):
    """NLL of chosen - odds_weight * log s(log odds(chosen) - log odds(rejected)), without reference.

    log odds = m - log(1 - e^m), m the log-prob per token. odds_weight >= 0: lambda in the paper.
    nll_scope: the tokens of the NLL, one mean over all of a step. `whole` is prompt and completion (the authors'
    default and TRL), `completion` the targets alone.
    Hong et al. 2024, ORPO, arXiv 2403.07691.
    """

    odds_weight: float
    nll_scope: Scope

    kind = "pair"

    def __post_init__(self) -> None:
        not_negative("objective.odds_weight", self.odds_weight)
        one_of("objective.nll_scope", self.nll_scope, ("whole", "completion"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The chosen row once more with its prompt as targets, where the NLL is over both."""
        return ("chosen_whole",) if self.nll_scope == "whole" else ()

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """The odds term [P] and the NLL [targets of its column]."""
        ratio = log_odds_ratio(policy, batch)
        metrics = mean_metrics(policy, batch, self.odds_weight)
        metrics["odds/log_ratio"] = ratio.detach()
        column = 2 if self.columns else 0
        metrics["nll"] = nll_means(policy, batch, column).detach()
        odds = Term(-torch.nn.functional.logsigmoid(ratio), "example", self.odds_weight)
        return Losses((odds, nll_term(policy, batch, 1.0, column)), metrics)


def log_odds_ratio(policy: Stats, batch: PackedBatch) -> Tensor:
    """log odds(chosen) - log odds(rejected) [P], of log-probs per token."""
    chosen, rejected = mean_logps(policy, batch)
    return _log_odds(chosen) - _log_odds(rejected)


def mean_logps(policy: Stats, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Log-probs per token of chosen and rejected, each [P]; 0 without targets. Raises ValueError without pairs."""
    if len(batch.groups) == 0:
        raise ValueError("the batch has no pairs")
    means = (policy.logps / positive(policy.lengths))[batch.groups[:, :2]]
    return means[:, 0], means[:, 1]


def mean_metrics(policy: Stats, batch: PackedBatch, scale: float) -> dict[str, Tensor]:
    """Metrics [P] of objectives whose reward is scale times the log-prob per token; logps are sums, a tie is wrong."""
    with torch.no_grad():
        logps = policy.logps.detach()[batch.groups[:, :2]]
        chosen, rejected = (values.detach() for values in mean_logps(policy, batch))
        return {
            "reward/chosen": scale * chosen,
            "reward/rejected": scale * rejected,
            "reward/margin": scale * (chosen - rejected),
            "accuracy": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }


def _log_odds(mean: Tensor) -> Tensor:
    # A probability of 1, or a completion without tokens, has infinite odds: the nearest number below 1 stands for it.
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - (-mean.expm1()).log()
