"""Objectives over pairs: DPO with its base losses, and WPO over any of them.

A base loss maps the log-ratios of a pair to a loss; an objective adds the reference, weights and metrics.
Nothing here reduces: the loop divides by the global number of pairs.

z = beta * (chosen - rejected), where chosen and rejected are sums over completion tokens of
log policy - log reference (nats).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from align.stats import row_means
from align.types import Losses, PackedBatch, Stats, Term

Alignment = Literal["none", "greedy", "sampled"]


@dataclass(frozen=True)
class Ratios:
    """Log-ratios log policy - log reference of P pairs, summed over the targets, and how many there are."""

    chosen: Tensor  # [P] nats
    rejected: Tensor  # [P] nats
    chosen_lengths: Tensor  # [P] tokens, at least 1
    rejected_lengths: Tensor  # [P] tokens, at least 1


BaseLoss = Callable[[Ratios, float], Tensor]


@dataclass(frozen=True)
class Sigmoid:
    """-(1 - e) log s(z) - e log s(-z): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); e > 0 is
    conservative DPO, the probability that a label is flipped (Mitchell 2023, cdpo.pdf, eq. 3).

    TRL 1.16 ignores label smoothing here; the authors' repository does not, nor does this.
    """

    label_smoothing: float

    def __post_init__(self) -> None:
        _within("objective.loss.label_smoothing", self.label_smoothing, 0, 0.5)

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        z = beta * (ratios.chosen - ratios.rejected)
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


@dataclass(frozen=True)
class Robust:
    """(-(1 - e) log s(z) + e log s(-z)) / (1 - 2e): unbiased when a share e of the labels is flipped.

    Can be negative. Chowdhury et al. 2024, robust DPO, arXiv 2403.00409, eq. 9.
    """

    label_smoothing: float

    def __post_init__(self) -> None:
        _within("objective.loss.label_smoothing", self.label_smoothing, 0, 0.5)

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        z = beta * (ratios.chosen - ratios.rejected)
        e = self.label_smoothing
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - z): SLiC's hinge on DPO's margin (Zhao et al. 2023, arXiv 2305.10425)."""

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return torch.relu(1 - beta * (ratios.chosen - ratios.rejected))


@dataclass(frozen=True)
class IpoSum:
    """(chosen - rejected - 1 / (2 beta))^2 on token sums: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    beta is the paper's tau. The DPO authors' repository computes this form.
    """

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return (ratios.chosen - ratios.rejected - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class IpoMean:
    """IPO on per-token means, as TRL computes it: another loss than IpoSum, with another scale of beta."""

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        chosen = ratios.chosen / ratios.chosen_lengths
        rejected = ratios.rejected / ratios.rejected_lengths
        return (chosen - rejected - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation: a base loss on how much more than the reference the policy prefers chosen.

    beta: strength of the pull to the reference, > 0; policy and reference agree => the sigmoid loss is ln 2.
    """

    beta: float
    loss: BaseLoss

    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        _positive("objective.beta", self.beta)

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P] of the pairs [P, 2] of a batch, and the usual metrics; reference logps: [N], no gradient."""
        ratios = pair_ratios(policy, reference, batch)
        return Losses(
            terms=(Term(self.loss(ratios, self.beta), "pair"),),
            metrics=preference_metrics(policy, ratios, batch, self.beta),
        )


@dataclass(frozen=True)
class WPO:
    """DPO with each pair weighted by how likely the current policy is to produce it itself.

    weight = min(clamp_max, w(chosen) w(rejected)), no gradient flows through it;
    log w = mean over completion tokens of log p(token) - a, where for alignment
      none     a = 0
      greedy   a = log max_v p(v): w is 1 for a greedy completion
      sampled  a = log sum_v p(v)^2: w is about 1 for a sampled completion
    A completion without tokens has w = 1. beta, loss: as in DPO; any base loss may be weighted.

    Zhou et al. 2024, WPO, arXiv 2406.11827. The authors' script clamps the product at 1 and knows the logistic
    loss and sampled alignment only; TRL does not clamp (clamp_max=null here).
    """

    beta: float
    loss: BaseLoss
    alignment: Alignment
    clamp_max: float | None

    def __post_init__(self) -> None:
        _positive("objective.beta", self.beta)
        if self.alignment not in _ALIGNMENT_NEEDS:
            raise ValueError(f"objective.alignment={self.alignment}: must be one of {', '.join(_ALIGNMENT_NEEDS)}")
        if self.clamp_max is not None:
            _positive("objective.clamp_max", self.clamp_max)

    @property
    def needs(self) -> frozenset[str]:
        """The reference, and what the alignment reads of the policy's full next-token distribution."""
        return frozenset({"reference"} | _ALIGNMENT_NEEDS[self.alignment])

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P] of the pairs of a batch, weighted; metrics are DPO's and wpo/*, never weighted themselves."""
        ratios = pair_ratios(policy, reference, batch)
        weights = self.pair_weights(policy, batch)  # [P]
        metrics = preference_metrics(policy, ratios, batch, self.beta)
        metrics["wpo/weight"] = weights
        if self.clamp_max is not None:
            metrics["wpo/clamped_fraction"] = (weights >= self.clamp_max).to(weights.dtype)
        term = Term(self.loss(ratios, self.beta) * weights, "pair")
        return Losses((term,), metrics, by_origin=("wpo/weight",))

    def row_log_weights(self, policy: Stats) -> Tensor:
        """log w [N] of each sequence, no gradient."""
        alignment = {"none": None, "greedy": policy.log_max, "sampled": policy.log_collision}[self.alignment]
        values = policy.token_logps.detach()
        if alignment is not None:
            values = values - alignment.detach()
        return row_means(values, policy.row, policy.lengths)

    def pair_weights(self, policy: Stats, batch: PackedBatch) -> Tensor:
        """Weights [P] after the clamp; the product is clamped, not each factor."""
        weights = self.row_log_weights(policy)[batch.pairs].sum(1).exp()
        return weights if self.clamp_max is None else weights.clamp(max=self.clamp_max)


_ALIGNMENT_NEEDS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "greedy": frozenset({"log_max"}),
    "sampled": frozenset({"log_collision"}),
}


def pair_ratios(policy: Stats, reference: Stats, batch: PackedBatch) -> Ratios:
    """Log-ratios of the pairs of a batch. Raises ValueError if it has none."""
    if len(batch.pairs) == 0:
        raise ValueError("the batch has no pairs")
    ratios = (policy.logps - reference.logps.detach())[batch.pairs]  # [P, 2]
    lengths = policy.lengths.clamp(min=1)[batch.pairs]
    return Ratios(ratios[:, 0], ratios[:, 1], lengths[:, 0], lengths[:, 1])


def preference_metrics(policy: Stats, ratios: Ratios, batch: PackedBatch, beta: float) -> dict[str, Tensor]:
    """Metrics [P]: implicit rewards beta * log-ratio (nats), accuracy (a tie is wrong), log-probs."""
    with torch.no_grad():
        logps = policy.logps.detach()[batch.pairs]
        chosen, rejected = beta * ratios.chosen.detach(), beta * ratios.rejected.detach()
        return {
            "reward/chosen": chosen,
            "reward/rejected": rejected,
            "reward/margin": chosen - rejected,
            "accuracy": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{key}={value}: must be greater than 0")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{key}={value}: must be at least {low} and below {high}")
