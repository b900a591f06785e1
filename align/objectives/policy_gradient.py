"""Objectives of online reinforcement learning: the plain policy gradient and the clipped one, with what is added.

An example is a prompt, its rows are the prompt's completions. What each token is worth stands in columns of the
batch, computed over the whole step beforehand; nothing here knows how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from align.deferred import Tensor, no_grad, torch
from align.objectives.base import Objective
from align.objectives.checks import not_negative, one_of, positive_value
from align.objectives.mismatch import (
    Correction,
    Gap,
    Uncorrected,
    correction_weights,
    gap_of,
    off_policy_mask,
    weight_totals,
)
from align.sums import positive, row_sums, target_sums
from align.types import Losses, PackedBatch, Stats, Term

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_sum_over_length"]
Estimator = Literal["k1", "k2", "k3", "abs"]

# exp(20) = 5e8 leaves float32 room for advantages; a log-ratio beyond it has no gradient, as in verl@b178a3c
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class _Online(Objective):
    """What the objectives share: the steps from the loss of a token to that of a step, and the terms beside it.

    Columns of the batch [C]: advantages; old_logps, of the policy as it was when the step began (without them the
    policy is that one, ratio 1); rollout_logps, of the engine; returns and old_values for the value head.
    With global_advantages and local_weight the loss of a token is w L(advantages) + (1 - w) L(global_advantages):
    COPO (arXiv 2508.04138).

    aggregation, of this loss, of the KL and of the entropy alike:
      token_mean                 mean over all tokens of the step (DAPO)
      sequence_mean_token_mean   mean over completions of the mean over tokens (GRPO)
      sequence_mean_token_sum    mean over completions of the sum over tokens
      sequence_sum_over_length   the same sum divided by max_length, a constant (Dr. GRPO, arXiv 2503.20783). verl's
                                 seq-mean-token-sum-norm lacks the mean over completions.
      A completion without tokens is not counted.
    kl_coefficient > 0 adds the KL to the reference by kl_estimator, see kl_estimate.
    entropy_coefficient > 0 subtracts the entropy of the next-token distributions, with its exact gradient.
    value_coefficient > 0 adds half the squared error of the value head, mean over its outputs and over tokens; with
    value_clip the larger one of the errors of the value and of the value moved into old_values +- value_clip.
    off_policy_threshold: see mismatch.off_policy_mask; against rollout_logps, or old_logps where the rows lack them.
    correction: multiplies the loss of each token, clipped or not, but neither KL nor entropy: see mismatch.

    Metrics are means over the tokens of an example, NaN without tokens:
      policy/kl_old               old - policy log-prob: an estimate of the KL of the step's start to now
      entropy/policy              nats
      kl/loss                     what kl_estimator says, with kl_coefficient > 0
      value/error, value/returns, value/returns_squared   (return - value)^2, return, return^2; the share of variance
                                  explained is 1 - error / (returns_squared - returns^2)
      value/clip_fraction         tokens at which the error of the moved value counts
      rollout/logp_diff_mean      |old - rollout log-prob|, if the rows have rollout_logps
      rollout/weight_ess          (sum w)^2 / (n sum w^2) of the correction's weights: share of tokens that count
      rollout/weight_max          largest ratio before a threshold
      rollout/weight_changed_fraction, rollout/dropped_fraction   tokens whose weight a threshold changed, and those
                                  for which the engine gave no number
      rollout/off_policy_fraction tokens left out for off_policy_threshold
    """

    aggregation: Aggregation
    max_length: int | None
    kl_coefficient: float
    kl_estimator: Estimator
    entropy_coefficient: float
    value_coefficient: float
    value_clip: float | None
    off_policy_threshold: float | None
    correction: Correction

    kind = "rollout"

    def __post_init__(self) -> None:
        one_of("objective.aggregation", self.aggregation, get_args(Aggregation))
        one_of("objective.kl_estimator", self.kl_estimator, get_args(Estimator))
        for name in ("kl_coefficient", "entropy_coefficient", "value_coefficient"):
            not_negative(f"objective.{name}", getattr(self, name))
        if (self.aggregation == "sequence_sum_over_length") != (self.max_length is not None):
            raise ValueError(
                f"objective.max_length={self.max_length}: objective.aggregation=sequence_sum_over_length needs the "
                "limit of a completion's tokens, any other aggregation needs null"
            )
        if self.max_length is not None:
            positive_value("objective.max_length", self.max_length)
        if self.value_clip is not None:
            positive_value("objective.value_clip", self.value_clip)
            if self.value_coefficient == 0:
                raise ValueError(
                    f"objective.value_clip={self.value_clip} has no effect with objective.value_coefficient=0; use null"
                )
        if self.off_policy_threshold is not None:
            not_negative("objective.off_policy_threshold", self.off_policy_threshold)

    @property
    def needs(self) -> frozenset[str]:
        """The entropy always, for it is watched; reference and values where their coefficients are above 0."""
        names = {"entropy_bonus" if self.entropy_coefficient else "entropy"}
        if self.kl_coefficient:
            names.add("reference")
        if self.value_coefficient:
            names.add("values")
        return frozenset(names)

    @property
    def step_rows(self) -> str | None:
        """examples where weights are divided by their mean over the step, which the loop then computes first."""
        return "examples" if self.correction.normalise else None

    def step_values(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Tensor:  # noqa: ARG002
        """Sum and number [P, 2] of the correction's weights of each example."""
        gap = self._gap(_old_logps(policy, batch), batch)
        weights, _ = correction_weights(self.correction, gap)
        totals = torch.stack(weight_totals(self.correction, weights, gap), 1)  # [N, 2]
        return totals[batch.groups].sum(1)

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:
        """Terms by token, or by row for the aggregations over sequences; metrics [P] as the class says.

        Raises ValueError if the rows lack a column that a setting needs.
        """
        logps, old = policy.token_logps, _old_logps(policy, batch)
        losses, metrics = self._blended(logps, old, batch)
        metrics["policy/kl_old"] = example_means(log_ratios(old, logps.detach()), batch)
        weights, measured = self._weights(policy, old, batch)
        terms = [self._aggregated(losses if weights is None else losses * weights, batch, 1.0)]
        metrics |= measured
        if self.kl_coefficient:
            if reference is None:
                raise ValueError(f"objective.kl_coefficient={self.kl_coefficient} needs a reference; use 0 without one")
            kl = kl_estimate(logps, reference.token_logps.detach(), self.kl_estimator)
            terms.append(self._aggregated(kl, batch, self.kl_coefficient))
            metrics["kl/loss"] = example_means(kl, batch)
        if self.entropy_coefficient:
            assert policy.entropy_bonus is not None
            terms.append(self._aggregated(-policy.entropy_bonus, batch, self.entropy_coefficient))
        entropy = policy.entropy if policy.entropy_bonus is None else policy.entropy_bonus
        if entropy is not None:
            metrics["entropy/policy"] = example_means(entropy, batch)
        if self.value_coefficient:
            term, measured = self._value_term(policy, batch)
            terms.append(term)
            metrics |= measured
        return Losses(tuple(terms), metrics)

    def token_losses(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
        """Losses [C] of tokens with these log-probs and advantages, before weights."""
        raise NotImplementedError

    def clipping(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Metric -> tokens [C] bool at which a limit took the gradient away."""
        raise NotImplementedError

    def _blended(self, logps: Tensor, old: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [C], and what clipping did to them."""
        advantages = _column(batch, "advantages", logps, "which an online run computes; data need another objective")
        losses = self.token_losses(logps, old, advantages)
        if "global_advantages" in batch.columns:
            local = _column(batch, "local_weight", logps, "which go with global_advantages")
            other = _column(batch, "global_advantages", logps, "")
            losses = local * losses + (1 - local) * self.token_losses(logps, old, other)
            advantages = local * advantages + (1 - local) * other
        with torch.no_grad():
            limits = self.clipping(logps.detach(), old, advantages)
            return losses, {name: example_means(at.to(logps.dtype), batch) for name, at in limits.items()}

    @no_grad
    def _weights(self, policy: Stats, old: Tensor, batch: PackedBatch) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the losses [C] are multiplied with, None for 1, and what the engine's log-probs tell."""
        corrected = not isinstance(self.correction, Uncorrected)
        measured: dict[str, Tensor] = {}
        weights = None
        if corrected or "rollout_logps" in batch.columns:
            gap = self._gap(old, batch)
            measured["rollout/logp_diff_mean"] = example_means(gap.log_ratio.abs(), batch, ~gap.dropped)
            if corrected:
                weights, changed = correction_weights(self.correction, gap)
                if self.correction.normalise:
                    total, count = batch.extras["step_values"].to(weights.dtype).sum(0)
                    weights = weights / positive(total / positive(count))
                measured |= _weight_metrics(weights, changed, gap, self.correction, batch)
        if self.off_policy_threshold is not None:
            advantages = _column(batch, "advantages", old, "")
            sampled = _column(batch, "rollout_logps", old, "") if "rollout_logps" in batch.columns else old
            mask = off_policy_mask(
                advantages, policy.token_logps, sampled, batch.row, len(batch.lengths), self.off_policy_threshold
            )
            measured["rollout/off_policy_fraction"] = example_means(1 - mask, batch)
            weights = mask if weights is None else weights * mask
        return weights, measured

    def _gap(self, old: Tensor, batch: PackedBatch) -> Gap:
        sampled = _column(
            batch, "rollout_logps", old, "log-probs of the engine; use a rollout that tells them or correction=none"
        )
        return gap_of(old, sampled, batch.row, len(batch.lengths))

    def _aggregated(self, losses: Tensor, batch: PackedBatch, weight: float) -> Term:
        if self.aggregation == "token_mean":
            return Term(_weighted(losses, batch), "token", weight)
        sums = target_sums(losses, batch)
        if self.aggregation == "sequence_mean_token_mean":
            sums = sums / positive(batch.lengths)
        elif self.max_length is not None:
            sums = sums / self.max_length
        return Term(sums, "row", weight)

    def _value_term(self, policy: Stats, batch: PackedBatch) -> tuple[Term, dict[str, Tensor]]:
        values = policy.values
        assert values is not None
        cure = "which an estimator with a value head computes, such as ppo; use objective.value_coefficient=0 without"
        returns = _column(batch, "returns", values, cure)
        errors = (values - returns).square()
        measured = {
            "value/error": example_means(_over_outputs(errors), batch),
            "value/returns": example_means(_over_outputs(returns), batch),
            "value/returns_squared": example_means(_over_outputs(returns.square()), batch),
        }
        if self.value_clip is not None:
            old = _column(batch, "old_values", values, "which objective.value_clip compares with; use null without")
            moved = values.clamp(old - self.value_clip, old + self.value_clip)
            moved_errors = (moved - returns).square()
            clipped = _over_outputs((moved_errors > errors).to(errors.dtype))
            measured["value/clip_fraction"] = example_means(clipped, batch)
            errors = torch.maximum(errors, moved_errors)
        return Term(_weighted(0.5 * _over_outputs(errors), batch), "token", self.value_coefficient), measured


@dataclass(frozen=True)
class PolicyGradient(_Online):
    """-advantage * log p of each token: REINFORCE, RLOO, ReMax, for one optimiser step per rollout.

    old_logps do not enter the loss, only the correction and policy/kl_old.
    Williams 1992; ReMax: Li et al. 2023, arXiv 2310.10505. Settings as in _Online.
    """

    def token_losses(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:  # noqa: ARG002
        """-A log p [C]."""
        return -advantages * logps

    def clipping(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Nothing is clipped."""
        return {}


@dataclass(frozen=True)
class Clipped(_Online):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) of each token, r = policy / old probability: PPO, GRPO, DAPO.

    dual_clip c > 1: where A < 0 the loss is at most -c A, so that a single ratio far above 1 cannot rule a step; null:
    no limit. At r = 1 the gradient is that of PolicyGradient. Log-ratios beyond +-20 are taken for +-20.
    Schulman et al. 2017, arXiv 1707.06347; clip-higher: DAPO, arXiv 2503.14476; dual clip: Ye et al. 2019,
    arXiv 1912.09729. Settings as in _Online.

    Metrics policy/clip_low (A < 0, r below the range), policy/clip_high (A > 0, r above it) and policy/clip_dual:
    fractions of tokens whose loss is a limit and has no gradient. With COPO's two advantages A is their weighted sum.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("objective.clip_low", self.clip_low)
        not_negative("objective.clip_high", self.clip_high)
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"objective.dual_clip={self.dual_clip}: must be greater than 1, or null")

    def token_losses(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
        """Losses [C]."""
        ratios = log_ratios(logps, old_logps).exp()
        limited = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = torch.maximum(-advantages * ratios, -advantages * limited)
        if self.dual_clip is None:
            return losses
        return torch.where(advantages < 0, torch.minimum(losses, -advantages * self.dual_clip), losses)

    def clipping(self, logps: Tensor, old_logps: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """policy/clip_low, policy/clip_high, and policy/clip_dual where dual_clip is on."""
        ratios = log_ratios(logps, old_logps).exp()
        at = {
            "policy/clip_low": (advantages < 0) & (ratios < 1 - self.clip_low),
            "policy/clip_high": (advantages > 0) & (ratios > 1 + self.clip_high),
        }
        if self.dual_clip is not None:
            at["policy/clip_dual"] = (advantages < 0) & (ratios > self.dual_clip)
        return at


def log_ratios(logps: Tensor, old_logps: Tensor) -> Tensor:
    """logps - old_logps [C], within +-20."""
    return (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_estimate(logps: Tensor, reference_logps: Tensor, estimator: Estimator) -> Tensor:
    """Estimates [C] of KL(policy || reference) from the tokens drawn; d = policy - reference log-prob.

    k1   d: unbiased as a number; as a loss its gradient is 0 in expectation
    k2   d^2 / 2: its gradient is that of the KL
    k3   exp(-d) + d - 1: unbiased as a number, never negative; d within +-20, the value at most 10, beyond which there
         is no gradient (verl@b178a3c kl_penalty)
    abs  |d|
    Schulman 2020, "Approximating KL divergence".
    """
    difference = logps - reference_logps
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "abs":
        return difference.abs()
    difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ((-difference).exp() + difference - 1).clamp(max=10.0)


def example_means(values: Tensor, batch: PackedBatch, where: Tensor | None = None) -> Tensor:
    """Means [P] of token values [C] over the targets of an example, those in `where` [C] bool; NaN without any."""
    values = values.detach()
    counted = torch.ones_like(values) if where is None else where.to(values.dtype)
    sums = _example_sums(values if where is None else values.masked_fill(~where, 0.0), batch)
    return sums / _example_sums(counted, batch)


def _example_sums(values: Tensor, batch: PackedBatch) -> Tensor:
    return row_sums(values, batch.row, len(batch.lengths))[batch.groups].sum(1)


def _weight_metrics(
    weights: Tensor, changed: Tensor, gap: Gap, correction: Correction, batch: PackedBatch
) -> dict[str, Tensor]:
    counts = _example_sums(torch.ones_like(weights), batch)  # [P]
    squares = _example_sums(weights.square(), batch)
    ratios = gap.ratios(correction.level).masked_fill(gap.dropped, 0.0)
    largest = ratios.new_zeros(len(batch.lengths)).scatter_reduce(0, batch.row, ratios, "amax")
    return {
        "rollout/weight_ess": _example_sums(weights, batch).square() / (counts * positive(squares)),
        "rollout/weight_max": torch.where(counts > 0, largest[batch.groups].amax(1), torch.nan),
        "rollout/weight_changed_fraction": example_means(changed.to(weights.dtype), batch),
        "rollout/dropped_fraction": example_means(gap.dropped.to(weights.dtype), batch),
    }


def _old_logps(policy: Stats, batch: PackedBatch) -> Tensor:
    """[C], no gradient; those of the policy itself, bit for bit, if the rows have none."""
    logps = policy.token_logps.detach()
    return _column(batch, "old_logps", logps, "") if "old_logps" in batch.columns else logps


def _column(batch: PackedBatch, name: str, like: Tensor, cure: str) -> Tensor:
    """The column [C] of that name. Raises ValueError if the rows have none."""
    if name not in batch.columns:
        raise ValueError(f"{batch.sources[0]}: the rows have no column {name}, {cure}")
    return batch.columns[name].to(like.dtype)


def _over_outputs(values: Tensor) -> Tensor:
    """[C] of [C], or means of [C, K] over the outputs of a value head."""
    return values if values.ndim == 1 else values.mean(1)


def _weighted(values: Tensor, batch: PackedBatch) -> Tensor:
    return values if batch.target_weights is None else values * batch.target_weights
