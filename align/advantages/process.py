"""Estimators that read the reward of each step of a completion: PURE's two forms, and MRT's progress bonus."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from align.advantages.base import (
    Advantage,
    at_last,
    estimate,
    fold,
    group_counts,
    leave_one_out,
    num_prompts,
    one_of,
    penalties,
    positions,
    row_lengths,
    row_sums,
    to_go,
    unfold,
    whitened,
    within,
)
from align.contracts import adopt
from align.deferred import Tensor, no_grad, torch
from align.types import Episodes, Estimate


@dataclass(frozen=True)
class PURE(Advantage):
    """Process rewards weighted so that their sum is about their minimum, minus a leave-one-out baseline, to go.

    At the end of step s: w_s rho_s - b, with w = softmax(-rho / temperature) over the steps of the completion;
    temperature inf: w = 1 / steps, the authors' disable_weighted. null: w = 1, the sum-form that rewards fillers, and
    for rewards that are weighted already. baseline token: b = (sum of the other completions'
    rewards / their tokens) * tokens of the step; step: b = mean over the others of reward / number of steps. At the
    last token outcome_weight * (score - mean of the others'), the verifiable reward: a prompt without one needs equal
    scores, such as 0. Penalties are added to their tokens. In a group of one b is 0 and the score has no baseline.
    Cheng et al. 2025, PURE, arXiv 2504.15275; CJReinforce/PURE@41f9363, branch main.
    """

    columns = frozenset({"advantages"})

    temperature: float | None
    baseline: str
    outcome_weight: float

    needs = frozenset({"steps"})

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"advantage.temperature={self.temperature}: must be greater than 0, or null")
        one_of("baseline", self.baseline, ("token", "step"))
        within("outcome_weight", self.outcome_weight, 0, math.inf)

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages."""
        steps = episodes.steps
        assert steps is not None
        scored = ~episodes.scores.isnan()
        rewards = weighted_steps(episodes, self.temperature)
        ends = ~steps.isnan()
        if self.baseline == "token":
            base = self._per_token(rewards, episodes, scored) * step_lengths(episodes)
        else:
            base = self._per_step(rewards, episodes, scored)
        rewards = torch.where(ends, rewards - base, 0.0) + penalties(episodes)
        outcome = torch.where(scored, self.outcome_weight * leave_one_out(episodes.scores, episodes, scored), 0.0)
        advantages = to_go(rewards + at_last(outcome, episodes), episodes, 1.0)
        return estimate(advantages, episodes, scored, step_metrics(episodes, scored))

    def _per_token(self, rewards: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
        """Reward per token of the prompt's other completions [C]."""
        num = len(episodes.scores)
        given = _others(row_sums(rewards, episodes.row, num), episodes, scored)
        tokens = _others(row_lengths(episodes).to(rewards.dtype), episodes, scored)
        return torch.where(tokens > 0, given / tokens.clamp(min=1), 0.0)[episodes.row]

    def _per_step(self, rewards: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
        """Mean over the prompt's other completions that have steps of their mean reward per step [C]."""
        num = len(episodes.scores)
        counts = row_sums((~episodes.steps.isnan()).to(rewards.dtype), episodes.row, num)  # type: ignore[union-attr]
        mean = row_sums(rewards, episodes.row, num) / counts.clamp(min=1)
        stepped = scored & (counts > 0)
        others = _others(stepped.to(rewards.dtype), episodes, stepped)
        return torch.where(others > 0, _others(mean, episodes, stepped) / others.clamp(min=1), 0.0)[episodes.row]


@dataclass(frozen=True)
class PUREStrictMin(Advantage):
    """The smallest process reward from a token on, minus a leave-one-out baseline.

    G_t = min_k>=t of the rewards, where tokens without one count as 0, and so does what is left of `length`: G is above
    0 only in a completion of exactly `length` tokens. Baseline: sum over the prompt's other completions of their sum
    of G over tokens, / (their number * length). aggregate sum: G_t is the sum instead. The score enters as in PURE
    and penalties are added to their tokens, both before whitening; the authors' branch puts them into the rewards.
    In a group of one the baseline is 0.
    Cheng et al. 2025, PURE, arXiv 2504.15275; CJReinforce/PURE@41f9363, branch verl, where length is the width of the
    padded batch.
    """

    columns = frozenset({"advantages"})

    aggregate: str
    length: int
    whiten: str
    outcome_weight: float

    needs = frozenset({"steps"})

    def __post_init__(self) -> None:
        one_of("aggregate", self.aggregate, ("min", "sum"))
        within("length", self.length, 1, math.inf)
        one_of("whiten", self.whiten, ("none", "sample", "population"))
        within("outcome_weight", self.outcome_weight, 0, math.inf)

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages. Raises ValueError for a completion of more than `length` tokens."""
        steps = episodes.steps
        assert steps is not None
        longest = int(row_lengths(episodes).max())
        if longest > self.length:
            raise ValueError(
                f"advantage.length={self.length}: a completion has {longest} tokens; use the limit of the rollout"
            )
        scored = ~episodes.scores.isnan()
        rewards = steps.nan_to_num(0.0)
        if self.aggregate == "sum":
            smallest = to_go(rewards, episodes, 1.0)
        else:
            # one column more than the longest, unless that fills the limit: what follows an end is 0
            folded = fold(rewards, episodes, min(longest + 1, self.length))
            smallest = unfold(folded.flip(1).cummin(1).values.flip(1), episodes)
        sums = row_sums(smallest, episodes.row, len(scored))
        others = _others(torch.ones_like(sums), episodes, scored)
        base = _others(sums, episodes, scored) / (others.clamp(min=1) * self.length)
        outcome = torch.where(scored, self.outcome_weight * leave_one_out(episodes.scores, episodes, scored), 0.0)
        extra = to_go(penalties(episodes), episodes, 1.0) + outcome[episodes.row]
        advantages = smallest - base[episodes.row] + extra
        if self.whiten != "none":
            advantages = whitened(advantages, scored[episodes.row], self.whiten)
        return estimate(advantages, episodes, scored, step_metrics(episodes, scored))


@dataclass(frozen=True)
class Progress(Advantage):
    """Another estimator over score + alpha * sum of the steps, which hold the progress of each block of a thought.

    Progress: success rate of the policy made to answer after the block, minus that before it (see progress).
    Qu et al. 2025, MRT, arXiv 2503.07572; the authors published no training code, so the formula is the paper's only.
    """

    columns = frozenset({"advantages"})

    alpha: float
    inner: Advantage

    def __post_init__(self) -> None:
        within("alpha", self.alpha, 0, math.inf)
        adopt(self.inner, Advantage, "advantage.inner")
        if "steps" in self.inner.needs:
            raise ValueError("advantage.inner: reads the steps itself; use one that compares scores, such as RLOO")

    @property
    def needs(self) -> frozenset[str]:
        """Those of the inner estimator, and steps."""
        return self.inner.needs | {"steps"}

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns of the inner estimator."""
        assert episodes.steps is not None
        bonus = row_sums(episodes.steps.nan_to_num(0.0), episodes.row, len(episodes.scores))
        inner = self.inner(replace(episodes, scores=episodes.scores + self.alpha * bonus))
        metrics = {"advantage/progress": float(bonus.mean())} if len(bonus) else {}
        return Estimate(inner.columns, inner.metrics | metrics)


def weighted_steps(episodes: Episodes, temperature: float | None) -> Tensor:
    """w_s rho_s at the end of each step and 0 elsewhere [C], w = softmax(-rho / temperature) over the completion.

    Its sum over a completion goes to the smallest rho as temperature goes to 0, and is their mean where it
    is inf. temperature None: w = 1.
    """
    assert episodes.steps is not None
    ends = ~episodes.steps.isnan()
    rho = episodes.steps.nan_to_num(0.0)
    if temperature is None:
        return rho
    low = rho.new_full((len(episodes.scores),), math.inf)
    low = low.scatter_reduce(0, episodes.row[ends], rho[ends], "amin")
    # counted from the smallest: exp of at most 0, whatever the temperature
    above = torch.where(ends, rho - low[episodes.row], 0.0)
    raw = torch.where(ends, (-above / temperature).exp(), 0.0)
    total = row_sums(raw, episodes.row, len(low))[episodes.row]
    return torch.where(ends, raw / torch.where(ends, total, 1.0) * rho, 0.0)


def step_lengths(episodes: Episodes) -> Tensor:
    """Tokens of the step that ends at a token, that token included; 0 where none ends [C] float64."""
    assert episodes.steps is not None
    ends = (~episodes.steps.isnan()).nonzero()[:, 0]
    place = positions(episodes)
    out = torch.zeros_like(episodes.steps)
    if len(ends):
        owner, at = episodes.row[ends], place[ends]
        before = torch.full_like(at, -1)
        before[1:] = torch.where(owner[1:] == owner[:-1], at[:-1], -1)
        out[ends] = (at - before).to(out.dtype)
    return out


def step_metrics(episodes: Episodes, scored: Tensor) -> dict[str, float]:
    """Means over the scored completions of their number of steps and of their smallest process reward."""
    assert episodes.steps is not None
    folded = fold(episodes.steps.nan_to_num(math.inf), episodes)
    ends = row_sums((~episodes.steps.isnan()).double(), episodes.row, len(scored))
    stepped = scored & (ends > 0)
    if not bool(stepped.any()):
        return {}
    inside = fold(torch.ones_like(episodes.steps), episodes) > 0
    smallest = torch.where(inside, folded, math.inf).amin(1)
    return {
        "advantage/steps": float(ends[scored].mean()),
        "advantage/smallest_step": float(smallest[stepped].mean()),
    }


def progress(success: Tensor) -> Tensor:
    """p_j = J_j - J_(j-1) [B, k] of success rates [B, k + 1] after 0 .. k blocks; sums to J_k - J_0."""
    return success[:, 1:] - success[:, :-1]


def regret(success: Tensor, oracle: Tensor) -> Tensor:
    """sum_j (oracle_j - J_j) [B] of success rates [B, k + 1] and those of the best policy [k + 1]."""
    return (oracle - success).sum(1)


def _others(values: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
    """Sum of values [N] over the prompt's other scored completions [N]."""
    values = torch.where(scored, values, 0.0)
    sums = row_sums(values, episodes.group, num_prompts(episodes))[episodes.group]
    # exactly 0 without others, whatever the rounding
    alone = group_counts(episodes, scored)[episodes.group] - scored.to(values.dtype) == 0
    return torch.where(alone, 0.0, sums - values)
