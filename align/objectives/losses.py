"""Base losses: log-ratios of pairs to one loss each. What log-ratios are made of is the objectives' business.

z = beta * (chosen - rejected), s is the logistic function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from align.contracts import adopt, is_function
from align.deferred import F, Tensor, torch
from align.objectives.checks import within


@dataclass(frozen=True)
class Ratios:
    """Log-ratios log policy - log reference of P pairs, summed over the targets, and how many there are."""

    chosen: Tensor  # [P] nats
    rejected: Tensor  # [P] nats
    chosen_lengths: Tensor  # [P] tokens, or the sum of their weights; greater than 0
    rejected_lengths: Tensor  # [P] as above


class BaseLoss(ABC):
    """What DPO, WPO and their kin take as `loss`; any callable (ratios, beta) -> losses serves."""

    __slots__ = ()

    # Whether it reads nothing but chosen - rejected of token sums: then it can be given other scores than log-ratios
    difference: bool = False

    @abstractmethod
    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""


@dataclass(frozen=True)
class FunctionLoss(BaseLoss):
    """A plain function as a base loss."""

    function: Callable[[Ratios, float], Tensor]

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return self.function(ratios, beta)


def as_loss(loss: object) -> BaseLoss:
    """A callable as a base loss, see contracts.adopt."""
    return FunctionLoss(loss) if is_function(loss) else adopt(loss, BaseLoss, "objective.loss")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sigmoid(BaseLoss):
    """-(1 - e) log s(z) - e log s(-z): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); e > 0 is
    conservative DPO, the probability that a label is flipped (Mitchell 2023, cdpo.pdf, eq. 3).

    TRL 1.16 ignores label smoothing here; the authors' repository does not, nor does this.
    """

    label_smoothing: float

    difference = True

    def __post_init__(self) -> None:
        within("objective.loss.label_smoothing", self.label_smoothing, 0, 0.5)

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return smoothed_logistic(beta * (ratios.chosen - ratios.rejected), self.label_smoothing)


@dataclass(frozen=True)
class SigmoidNorm(BaseLoss):
    """-log s(beta * (chosen per token - rejected per token)): length-normalised DPO.

    Ahrabian et al. 2024, arXiv 2407.15229 (LN-DPO). Per-token ratios are small, so beta is larger than DPO's: 1 to 3.
    """

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return -F.logsigmoid(beta * _mean_difference(ratios))


@dataclass(frozen=True)
class Robust(BaseLoss):
    """(-(1 - e) log s(z) + e log s(-z)) / (1 - 2e): unbiased when a share e of the labels is flipped.

    Can be negative. Chowdhury et al. 2024, robust DPO, arXiv 2403.00409, eq. 9.
    """

    label_smoothing: float

    difference = True

    def __post_init__(self) -> None:
        within("objective.loss.label_smoothing", self.label_smoothing, 0, 0.5)

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        z = beta * (ratios.chosen - ratios.rejected)
        e = self.label_smoothing
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge(BaseLoss):
    """max(0, 1 - z): SLiC's hinge on DPO's margin (Zhao et al. 2023, arXiv 2305.10425)."""

    difference = True

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return torch.relu(1 - beta * (ratios.chosen - ratios.rejected))


@dataclass(frozen=True)
class IpoSum(BaseLoss):
    """(chosen - rejected - 1 / (2 beta))^2 on token sums: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    beta is the paper's tau. The DPO authors' repository computes this form.
    """

    difference = True

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return (ratios.chosen - ratios.rejected - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class IpoMean(BaseLoss):
    """IPO on per-token means, as TRL computes it: another loss than IpoSum, with another scale of beta."""

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return (_mean_difference(ratios) - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class ExoPair(BaseLoss):
    """s(z) (log s(z) - log(1 - e)) + s(-z) (log s(-z) - log e): the reverse KL from the policy's preference to the
    label, smoothed by e > 0 (Ji et al. 2024, EXO, arXiv 2402.00856, eq. 16).

    TRL 1.16 rounds e to float32 first, a relative difference of 1e-7.
    """

    label_smoothing: float

    difference = True

    def __post_init__(self) -> None:
        if not 0 < self.label_smoothing < 0.5:
            given = self.label_smoothing
            raise ValueError(f"objective.loss.label_smoothing={given}: must be greater than 0 and below 0.5")

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        z = beta * (ratios.chosen - ratios.rejected)
        e = torch.tensor(self.label_smoothing, dtype=z.dtype, device=z.device)
        chosen = z.sigmoid() * (F.logsigmoid(z) - (-e).log1p())
        return chosen + (-z).sigmoid() * (F.logsigmoid(-z) - e.log())


@dataclass(frozen=True)
class NcaPair(BaseLoss):
    """-log s(a) - (log s(-a) + log s(-b)) / 2 with a, b = beta * chosen, rejected: noise contrastive alignment of two
    completions (Chen et al. 2024, arXiv 2402.05369). Keeps the likelihood of chosen from falling."""

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
        return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@dataclass(frozen=True)
class BcoPair(BaseLoss):
    """-log s(beta * chosen) - log s(-beta * rejected): a binary classifier of each completion on its own
    (Jung et al. 2024, BCO, arXiv 2404.04656), without the running mean that the paper subtracts, as TRL 1.16 has it."""

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return -F.logsigmoid(beta * ratios.chosen) - F.logsigmoid(-beta * ratios.rejected)


@dataclass(frozen=True)
class SppoHard(BaseLoss):
    """(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2: self-play preference optimisation when chosen beats
    rejected for certain (Wu et al. 2024, SPPO, arXiv 2405.00675, eq. 4.7 with P = 1 and 0). beta is 1 / eta there.
    """

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return (ratios.chosen - 0.5 / beta).square() + (ratios.rejected + 0.5 / beta).square()


@dataclass(frozen=True)
class ApoZero(BaseLoss):
    """s(-beta * chosen) + s(beta * rejected): chosen up, rejected down; for data better than the model.

    D'Oosterlinck et al. 2024, APO, arXiv 2408.06266, eq. 7.
    """

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return (-beta * ratios.chosen).sigmoid() + (beta * ratios.rejected).sigmoid()


@dataclass(frozen=True)
class ApoDown(BaseLoss):
    """s(beta * chosen) + s(-z): both down, rejected more; for data worse than the model (APO, eq. 8)."""

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        return (beta * ratios.chosen).sigmoid() + (-beta * (ratios.chosen - ratios.rejected)).sigmoid()


@dataclass(frozen=True)
class DiscoPop(BaseLoss):
    """(1 - m) (-log s(z)) + m e^-z with m = s(z / tau): log-ratio modulated loss, found by a language model
    (Lu et al. 2024, arXiv 2406.08414, eq. 5). m carries a gradient. tau in (0, 1]; the paper's is 0.05."""

    tau: float

    difference = True

    def __post_init__(self) -> None:
        # above 1 the loss grows without bound, and exponentially, as z falls
        if not 0 < self.tau <= 1:
            raise ValueError(f"objective.loss.tau={self.tau}: must be greater than 0 and at most 1")

    def __call__(self, ratios: Ratios, beta: float) -> Tensor:
        """Loss of each pair [P]."""
        z = beta * (ratios.chosen - ratios.rejected)
        scaled = z / self.tau
        # m e^-z as one exponential: apart they are 0 times infinity for z below -88 in float32
        return -(-scaled).sigmoid() * F.logsigmoid(z) + (F.logsigmoid(scaled) - z).exp()


def smoothed_logistic(z: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-(1 - e) log s(z) - e log s(-z) [P], e one number or one for each pair [P]."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _mean_difference(ratios: Ratios) -> Tensor:
    return ratios.chosen / ratios.chosen_lengths - ratios.rejected / ratios.rejected_lengths
