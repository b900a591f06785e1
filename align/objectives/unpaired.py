"""Objectives over single completions that are labelled desirable or not: KTO and APO-zero without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.deferred import Tensor, torch
from align.objectives.base import Objective
from align.objectives.checks import positive_value
from align.types import Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class KTO(Objective):
    """desirable_weight * s(beta (z0 - h)) or undesirable_weight * s(beta (h - z0)), by the label.

    h = log policy - log reference of the completion, summed over its targets: of a trajectory with tools, over all the
    model's own tokens. z0 = max(0, mean over the step of h of mismatched completions), one number for the whole
    step, without gradient: the loop runs step_values over the prompts with another prompt's completion first.
    Ethayarajh et al. 2024, KTO, arXiv 2402.01306; multi-turn: Xiong et al. 2024, arXiv 2409.02392.
    TRL takes z0 of each device's micro-batch and then their mean.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float

    kind = "labelled"
    needs = frozenset({"reference"})
    step_rows = "mismatched"

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        positive_value("objective.desirable_weight", self.desirable_weight)
        positive_value("objective.undesirable_weight", self.undesirable_weight)

    def step_values(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Tensor:
        """Log-ratios of mismatched completions [P, 1]."""
        return _log_ratios(policy, reference, batch).detach()[:, None]

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P]; metrics by label, NaN for the other label, and kl, the point z0 in nats."""
        labels = _labels(batch)
        ratios = _log_ratios(policy, reference, batch)
        # the mean first: a sum of clamps is biased
        point = batch.extras["step_values"][:, 0].mean().clamp(min=0).to(ratios.dtype)
        above = ratios - point
        signed = torch.where(labels, -above, above)
        losses = (self.beta * signed).sigmoid()
        losses = torch.where(labels, self.desirable_weight * losses, self.undesirable_weight * losses)
        metrics = label_metrics(policy, ratios, above, batch, self.beta)
        metrics["kl"] = point.expand(len(ratios))
        return Losses((Term(losses, "example"),), metrics)


@dataclass(frozen=True)
class ApoZeroUnpaired(Objective):
    """s(-beta h) for a desirable completion, s(beta h) for an undesirable one: KTO with z0 = 0 and weights 1.

    D'Oosterlinck et al. 2024, APO, arXiv 2408.06266, eq. 7, each half on its own.
    """

    beta: float

    kind = "labelled"
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P]; metrics as KTO's, without kl."""
        ratios = _log_ratios(policy, reference, batch)
        losses = (self.beta * torch.where(_labels(batch), -ratios, ratios)).sigmoid()
        return Losses((Term(losses, "example"),), label_metrics(policy, ratios, ratios, batch, self.beta))


def label_metrics(policy: Stats, ratios: Tensor, above: Tensor, batch: PackedBatch, beta: float) -> dict[str, Tensor]:
    """Metrics [P], NaN where the label is the other one. accuracy: on the label's side of the point; a tie is wrong."""
    with torch.no_grad():
        labels = _labels(batch)
        logps = policy.logps.detach()[batch.groups[:, 0]]
        rewards = beta * ratios.detach()
        nan = torch.full_like(rewards, torch.nan)
        return {
            "reward/chosen": torch.where(labels, rewards, nan),
            "reward/rejected": torch.where(labels, nan, rewards),
            "accuracy": torch.where(labels, above > 0, above < 0).to(rewards.dtype),
            "logps/chosen": torch.where(labels, logps, nan),
            "logps/rejected": torch.where(labels, nan, logps),
        }


def rotated_partners(num: int, chunk: int) -> list[int]:
    """Whose completion each of `num` prompts gets: that of the one before in its chunk, in a circle (TRL 1.16).

    The only member of a chunk keeps its own.
    """
    return [start + (i - 1) % size for start, size in _chunks(num, chunk) for i in range(size)]


def reversed_partners(num: int, chunk: int) -> list[int]:
    """As rotated_partners, in the reversed order of its chunk (TRL before 1.0 and its descendants).

    The middle of an odd chunk keeps its own completion, which makes z0 too large.
    """
    return [start + size - 1 - i for start, size in _chunks(num, chunk) for i in range(size)]


def _chunks(num: int, chunk: int) -> Sequence[tuple[int, int]]:
    return [(start, min(chunk, num - start)) for start in range(0, num, chunk)]


def _log_ratios(policy: Stats, reference: Stats, batch: PackedBatch) -> Tensor:
    return (policy.logps - reference.logps.detach())[batch.groups[:, 0]]


def _labels(batch: PackedBatch) -> Tensor:
    if batch.labels is None:
        raise ValueError("the batch has no labels: this objective reads desirable and undesirable completions")
    return batch.labels
