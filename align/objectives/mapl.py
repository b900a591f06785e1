"""Multi-level aware preference learning: pairs of three kinds. Experimental."""

from __future__ import annotations

from dataclasses import dataclass

from align.deferred import F, torch
from align.objectives.base import Objective
from align.objectives.checks import needed_number, not_negative, positive_value
from align.objectives.preference import pair_ratios, preference_metrics
from align.types import Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class MAPL(Objective):
    """DPO on three kinds of pairs. Experimental: a reconstruction from the paper's abstract, not its formulas.

    The number mapl_kind of a pair tells its kind, which has its weight and its z:
      0 plain  weight 1             z = beta (chosen - rejected): DPO
      1 intra  intra_weight >= 0    the same; both rows hold one response, under a prompt that it satisfies and one
                                    that it does not (the partition functions of the two prompts do not cancel)
      2 inter  inter_weight >= 0    z - margin * satisfied_gap, two responses to a prompt of several instructions; the
                                    number satisfied_gap is how many more of them chosen satisfies; margin >= 0
    loss = weight * -log s(z), one mean over the pairs of all kinds. Multi-level aware preference learning,
    arXiv 2505.12845.
    """

    beta: float
    intra_weight: float
    inter_weight: float
    margin: float

    kind = "pair"
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        for name in ("intra_weight", "inter_weight", "margin"):
            not_negative(f"objective.{name}", getattr(self, name))

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P]; metrics are DPO's, and accuracy by kind, NaN for the pairs of other kinds."""
        ratios = pair_ratios(policy, reference, batch)
        kind = needed_number(batch, "mapl_kind", "objective mapl")
        z = self.beta * (ratios.chosen - ratios.rejected)
        inter = kind == 2
        if self.margin > 0:
            gap = needed_number(batch, "satisfied_gap", f"objective.margin={self.margin}", inter).to(z.dtype)
            z = z - torch.where(inter, self.margin * gap, 0.0)
        losses = -F.logsigmoid(z)
        losses = torch.where(inter, self.inter_weight * losses, losses)
        losses = torch.where(kind == 1, self.intra_weight * losses, losses)
        metrics = preference_metrics(policy, ratios, batch, self.beta)
        for number, name in enumerate(("plain", "intra", "inter")):
            metrics[f"mapl/accuracy_{name}"] = torch.where(kind == number, metrics["accuracy"], torch.nan)
        return Losses((Term(losses, "example"),), metrics)
