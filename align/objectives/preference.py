"""Objectives over pairs with a reference: DPO with its base losses, WPO and RPO over any of them, AOT.

An objective adds the reference, weights, further terms and metrics to a base loss of losses.py. Nothing here
reduces: the loop divides by the global number of pairs or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from align.deferred import F, Tensor, torch
from align.objectives.base import Objective
from align.objectives.checks import not_negative, one_of, positive_value
from align.objectives.imitation import nll_means, nll_term
from align.objectives.losses import BaseLoss, Ratios, as_loss
from align.sums import positive, target_sums
from align.types import Losses, PackedBatch, Stats, Term

Alignment = Literal["none", "greedy", "sampled"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Normalisation = Literal["sum", "sequence_mean", "token_mean"]


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation: a base loss on how much more than the reference the policy prefers chosen.

    beta: strength of the pull to the reference, > 0; policy and reference agree => the sigmoid loss is ln 2.
    Two variants of what the base loss reads; reverse_kl, None and None switch them off:
    f_divergence, f_alpha: another divergence than the reverse KL holds the policy (Wang et al. 2023, f-DPO,
      arXiv 2309.16240); f_alpha, not 1, is the order of `alpha`. For base losses of the difference of sums only.
    ld_alpha: weight in [0, 1] of the tokens beyond the length of the shorter completion of the pair (Liu et al. 2024,
      LD-DPO, arXiv 2409.06411); rewards and log-probs in the metrics are weighted as well.
    """

    beta: float
    loss: BaseLoss
    f_divergence: Divergence
    f_alpha: float | None
    ld_alpha: float | None

    kind = "pair"
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        as_loss(self.loss)
        one_of("objective.f_divergence", self.f_divergence, ("reverse_kl", "forward_kl", "js", "alpha"))
        if (self.f_divergence == "alpha") != (self.f_alpha is not None) or self.f_alpha == 1:
            raise ValueError(
                f"objective.f_alpha={self.f_alpha}: objective.f_divergence=alpha needs a number other than 1 "
                "(whose limit is reverse_kl), any other divergence needs null"
            )
        if self.f_divergence != "reverse_kl":
            needs_difference(self.loss, f"objective.f_divergence={self.f_divergence}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"objective.ld_alpha={self.ld_alpha}: must be between 0 and 1, or null")

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P] of the pairs of a batch, and the usual metrics; reference logps: [N], no gradient."""
        if self.ld_alpha is not None:
            weights = beyond_shorter(batch, self.ld_alpha).to(policy.logps.dtype)
            policy, reference = _reweighted(policy, weights, batch), _reweighted(reference, weights, batch)
        ratios = pair_ratios(policy, reference, batch)
        scores = replace(ratios, chosen=self._score(ratios.chosen), rejected=self._score(ratios.rejected))
        return Losses(
            terms=(Term(self.loss(scores, self.beta), "example"),),
            metrics=preference_metrics(policy, ratios, batch, self.beta),
        )

    def _score(self, log_ratio: Tensor) -> Tensor:
        """f'(exp log_ratio) up to a constant, which the difference loses."""
        if self.f_divergence == "reverse_kl":
            return log_ratio
        if self.f_divergence == "js":
            return F.logsigmoid(log_ratio)
        order = (0.0 if self.f_alpha is None else self.f_alpha) - 1  # forward KL is alpha = 0
        # e^80 leaves float32 room for beta; beyond it the score is flat, as TRL's alpha divergence is
        return (order * log_ratio).clamp(max=80.0).expm1() / order


@dataclass(frozen=True)
class WPO(Objective):
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

    kind = "pair"

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        as_loss(self.loss)
        one_of("objective.alignment", self.alignment, tuple(_ALIGNMENT_NEEDS))
        if self.clamp_max is not None:
            positive_value("objective.clamp_max", self.clamp_max)

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
        term = Term(self.loss(ratios, self.beta) * weights, "example")
        return Losses((term,), metrics, by_origin=("wpo/weight",))

    def row_log_weights(self, policy: Stats, batch: PackedBatch) -> Tensor:
        """log w [N] of each sequence, no gradient."""
        alignment = {"none": None, "greedy": policy.log_max, "sampled": policy.log_collision}[self.alignment]
        values = policy.token_logps.detach()
        if alignment is not None:
            values = values - alignment.detach()
        return target_sums(values, batch) / positive(policy.lengths)

    def pair_weights(self, policy: Stats, batch: PackedBatch) -> Tensor:
        """Weights [P] after the clamp; the product is clamped, not each factor."""
        weights = self.row_log_weights(policy, batch)[batch.groups[:, :2]].sum(1).exp()
        return weights if self.clamp_max is None else weights.clamp(max=self.clamp_max)


_ALIGNMENT_NEEDS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "greedy": frozenset({"log_max"}),
    "sampled": frozenset({"log_collision"}),
}


@dataclass(frozen=True)
class RPO(Objective):
    """A base loss plus the negative log-likelihood of chosen, which keeps it from falling with rejected.

    normalisation, weight, in the order of the sources:
      sum            weight * beta * mean over pairs of the summed NLL (Liu et al. 2024, arXiv 2405.16436: eta)
      sequence_mean  weight * mean over pairs of the NLL per token (the same authors' second trainer)
      token_mean     weight * NLL of all chosen tokens of the step / their number (Pang et al. 2024, arXiv 2404.19733;
                     multi-turn DPO's nll_coefficient; TRL's sigmoid + sft)
    beta, loss: as in DPO. weight >= 0.
    """

    beta: float
    loss: BaseLoss
    normalisation: Normalisation
    weight: float

    kind = "pair"
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        as_loss(self.loss)
        one_of("objective.normalisation", self.normalisation, ("sum", "sequence_mean", "token_mean"))
        not_negative("objective.weight", self.weight)

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """The preference term [P], then the NLL [P] or [targets of chosen]; metrics are DPO's and nll."""
        ratios = pair_ratios(policy, reference, batch)
        if self.normalisation == "sum":
            nll = Term(-policy.logps[batch.groups[:, 0]], "example", self.weight * self.beta)
        elif self.normalisation == "sequence_mean":
            nll = Term(nll_means(policy, batch), "example", self.weight)
        else:
            nll = nll_term(policy, batch, self.weight)
        metrics = preference_metrics(policy, ratios, batch, self.beta)
        metrics["nll"] = nll_means(policy, batch).detach()
        return Losses((Term(self.loss(ratios, self.beta), "example"), nll), metrics)


@dataclass(frozen=True)
class AOT(Objective):
    """A base loss on sorted log-ratios: the distribution of chosen is to dominate that of rejected.

    paired: the k-th smallest chosen - rejected of the policy against the k-th smallest of the reference;
    else the k-th smallest log-ratio of chosen against the k-th smallest of rejected. The order is that of the whole
    optimiser step, so the loop runs step_values over it first. loss: of the difference only. beta: as in DPO.
    Melnyk et al. 2024, AOT, arXiv 2406.05882. TRL sorts within a device's micro-batch, another loss at each batch size.
    """

    beta: float
    loss: BaseLoss
    paired: bool

    kind = "pair"
    needs = frozenset({"reference"})
    step_rows = "examples"

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        needs_difference(self.loss, "AOT")

    def step_values(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Tensor:
        """The two numbers of each pair that are sorted [P, 2]: what stands on the left, what on the right."""
        return torch.stack(self._sides(policy, reference, batch), 1).detach()

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """One loss per pair [P]; over a step, values and gradients sum to those of the sorted numbers."""
        left, right = self._sides(policy, reference, batch)
        place = batch.extras["step_index"]
        all_left, all_right = batch.extras["step_values"].to(left.dtype).unbind(1)  # [B]
        losses = self._loss(left, _same_place(all_left, all_right, place))
        if not self.paired:
            other = self._loss(_same_place(all_right, all_left, place), right)
            # Each sorted couple is met twice, once from either side, each time with the gradient of that side alone:
            # the gradients add up, the values are to be halved.
            losses = losses + other - 0.5 * (losses + other).detach()
        ratios = pair_ratios(policy, reference, batch)
        return Losses((Term(losses, "example"),), preference_metrics(policy, ratios, batch, self.beta))

    def _sides(self, policy: Stats, reference: Stats, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        if not self.paired:
            ratios = pair_ratios(policy, reference, batch)
            return ratios.chosen, ratios.rejected
        of_policy, of_reference = (s.logps[batch.groups[:, :2]] for s in (policy, reference))
        return of_policy[:, 0] - of_policy[:, 1], (of_reference[:, 0] - of_reference[:, 1]).detach()

    def _loss(self, left: Tensor, right: Tensor) -> Tensor:
        ones = torch.ones_like(left)
        return self.loss(Ratios(left, right, ones, ones), self.beta)


@dataclass(frozen=True)
class INPO(Objective):
    """(h - 1 / (2 eta))^2: one step of iterative Nash policy optimisation on pairs sampled from the start policy.

    h = d(policy) - tau/eta d(reference) - (eta - tau)/eta d(start), d = log p(chosen) - log p(rejected), token sums.
    start is the policy this run began with, which wrote the pairs; reference stays the first policy of all runs.
    0 < tau <= eta: tau is the weight of the KL to the reference in the game, 1 / eta the step.
    tau = eta, or start = reference, is ipo_sum with beta = eta.
    Zhang et al. 2024, INPO, arXiv 2407.00617.
    """

    eta: float
    tau: float

    kind = "pair"
    needs = frozenset({"reference"})
    extras = frozenset({"start_token_logps"})

    def __post_init__(self) -> None:
        positive_value("objective.eta", self.eta)
        if not 0 < self.tau <= self.eta:
            raise ValueError(f"objective.tau={self.tau}: must be greater than 0 and at most objective.eta={self.eta}")

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P]; rewards in the metrics are eta times each completion's part of h, so their margin aims at 1/2."""
        start = target_sums(batch.extras["start_token_logps"], batch)
        share = self.tau / self.eta
        anchor = share * reference.logps + (1 - share) * start  # [N]
        ratios = pair_ratios(policy, replace(reference, logps=anchor), batch)
        losses = (ratios.chosen - ratios.rejected - 1 / (2 * self.eta)).square()
        return Losses((Term(losses, "example"),), preference_metrics(policy, ratios, batch, self.eta))


def needs_difference(loss: BaseLoss, who: str) -> None:
    """Raises ValueError if a base loss reads more than the difference of two sums."""
    if not as_loss(loss).difference:
        raise ValueError(
            f"{who} cannot be combined with objective.loss={type(loss).__name__}, which reads more than the difference "
            "of the two sums; choose objective/loss=sigmoid, hinge, robust, ipo_sum, exo_pair or discopop"
        )


def pair_ratios(policy: Stats, reference: Stats, batch: PackedBatch) -> Ratios:
    """Log-ratios of the pairs of a batch. Raises ValueError if it has none."""
    if len(batch.groups) == 0:
        raise ValueError("the batch has no pairs")
    pairs = batch.groups[:, :2]
    ratios = (policy.logps - reference.logps.detach())[pairs]  # [P, 2]
    lengths = positive(policy.lengths)[pairs]
    return Ratios(ratios[:, 0], ratios[:, 1], lengths[:, 0], lengths[:, 1])


def preference_metrics(policy: Stats, ratios: Ratios, batch: PackedBatch, beta: float) -> dict[str, Tensor]:
    """Metrics [P]: implicit rewards beta * log-ratio (nats), accuracy (a tie is wrong), log-probs."""
    with torch.no_grad():
        logps = policy.logps.detach()[batch.groups[:, :2]]
        chosen, rejected = beta * ratios.chosen.detach(), beta * ratios.rejected.detach()
        return {
            "reward/chosen": chosen,
            "reward/rejected": rejected,
            "reward/margin": chosen - rejected,
            "accuracy": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }


def beyond_shorter(batch: PackedBatch, alpha: float) -> Tensor:
    """Weights [C]: 1 for the first m targets of a completion, m the number of the shorter one's, alpha after them."""
    counts = torch.bincount(batch.row, minlength=len(batch.lengths))
    first = counts.cumsum(0) - counts  # [N] where the targets of each sequence begin: rows are ascending
    place = torch.arange(len(batch.row), device=batch.row.device) - first[batch.row]
    pairs = batch.groups[:, :2]
    shared = counts.scatter(0, pairs.reshape(-1), counts[pairs].amin(1).repeat_interleave(2))  # other rows: their own
    return torch.where(place < shared[batch.row], 1.0, alpha * torch.ones_like(place, dtype=torch.float64))


def _reweighted(stats: Stats, weights: Tensor, batch: PackedBatch) -> Stats:
    return replace(stats, logps=target_sums(stats.token_logps * weights, batch))


def _same_place(own: Tensor, other: Tensor, index: Tensor) -> Tensor:
    """The values [P] that have in `other` [B] the places by size that own[index] have in `own` [B]."""
    order = own.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return other.sort().values[place[index]]
