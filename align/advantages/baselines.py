"""Estimators that compare a score with a baseline made of scores: ReMax, REINFORCE, RLOO, GRPO, REINFORCE++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.advantages.base import (
    PENALTIES,
    VARIANCES,
    Advantage,
    at_last,
    bounds,
    estimate,
    group_metrics,
    group_normalised,
    leave_one_out,
    num_prompts,
    one_of,
    penalties,
    positions,
    positive,
    row_lengths,
    row_sums,
    to_go,
    whitened,
    within,
)
from align.deferred import Tensor, no_grad, torch
from align.types import Episodes, Estimate


@dataclass(frozen=True)
class ReMax(Advantage):
    """The score minus that of the policy's own greedy completion of the prompt, d = clip(r - greedy, -clip, clip).

    one_step: A_k = penalty_k + gamma^(L - k) d for k = 0 .. L - 1, so the last token has one factor gamma already and
    penalties are not cumulated (liziniu/ReMax@536ba49 compute_returns). to_go: A_k = sum_j>=k gamma^(j - k) penalty_j
    + gamma^(L - 1 - k) d; with gamma 1 and no clip that of verl@b178a3c. The greedy score holds no penalty.
    A prompt whose greedy completion has no score gives advantages of 0.
    Li et al. 2023, ReMax, arXiv 2310.10505.
    """

    columns = frozenset({"advantages"})

    form: str
    gamma: float
    clip: float | None

    needs = frozenset({"greedy"})

    def __post_init__(self) -> None:
        one_of("form", self.form, ("one_step", "to_go"))
        within("gamma", self.gamma, 0, 1)
        if self.clip is not None:
            positive("clip", self.clip)

    @property
    def scale_free(self) -> Literal[False] | None:
        """A clip may hide the factor."""
        return False if self.clip is None else None

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages."""
        greedy = episodes.greedy
        assert greedy is not None
        assert len(greedy) >= num_prompts(episodes)
        raw = episodes.scores - greedy[episodes.group]
        scored = ~raw.isnan()
        raw = torch.where(scored, raw, 0.0)
        difference = raw if self.clip is None else raw.clamp(-self.clip, self.clip)
        if self.form == "one_step":
            # a number to the power of an integer tensor would be float32
            left = (row_lengths(episodes)[episodes.row] - positions(episodes)).to(difference.dtype)
            advantages = penalties(episodes) + self.gamma**left * difference[episodes.row]
        else:
            advantages = to_go(penalties(episodes) + at_last(difference, episodes), episodes, self.gamma)
        metrics = {}
        if bool(scored.any()):
            kept = raw[scored]
            metrics = {
                "advantage/difference_mean": float(kept.mean()),
                "advantage/difference_std": float(kept.std(correction=0)),
                "advantage/positive_fraction": float((kept > 0).double().mean()),
                "advantage/clip_fraction": float((kept != difference[scored]).double().mean()),
            }
        return estimate(advantages, episodes, scored, metrics)


@dataclass(frozen=True)
class Reinforce(Advantage):
    """Reward to go of penalties and, at the last token, the score: no baseline.

    Williams 1992. Whitened over all tokens it is ReinforcePlusPlus.
    """

    columns = frozenset({"advantages"})

    gamma: float
    score_clip: Sequence[float] | None

    def __post_init__(self) -> None:
        within("gamma", self.gamma, 0, 1)
        bounds("score_clip", self.score_clip)

    @property
    def scale_free(self) -> Literal[False] | None:
        """A score_clip may hide the factor."""
        return False if self.score_clip is None else None

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages."""
        scored = ~episodes.scores.isnan()
        rewards = penalties(episodes) + at_last(clipped(episodes.scores, scored, self.score_clip), episodes)
        return estimate(to_go(rewards, episodes, self.gamma), episodes, scored)


@dataclass(frozen=True)
class RLOO(Advantage):
    """The score minus the mean of the prompt's other completions; the score itself in a group of one.

    penalty in_score: penalties are summed into the score first (verl@b178a3c). after_baseline: added to the tokens
    and cumulated after the baseline and the clip (OpenRLHF@3c3be62).
    Ahmadian et al. 2024, RLOO, arXiv 2402.14740.
    """

    columns = frozenset({"advantages"})

    penalty: str
    score_clip: Sequence[float] | None

    needs = frozenset({"group"})

    def __post_init__(self) -> None:
        one_of("penalty", self.penalty, PENALTIES)
        bounds("score_clip", self.score_clip)

    @property
    def scale_free(self) -> Literal[False] | None:
        """A score_clip may hide the factor."""
        return False if self.score_clip is None else None

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages."""
        scored = ~episodes.scores.isnan()
        shaped = leave_one_out(totals(episodes, self.penalty), episodes, scored)
        advantages = spread(clipped(shaped, scored, self.score_clip), episodes, self.penalty)
        return estimate(advantages, episodes, scored, group_metrics(episodes, scored))


@dataclass(frozen=True)
class GRPO(Advantage):
    """(score - group mean) / (group std + epsilon), std unbiased; without divide_by_std that of Dr.GRPO.

    Dr.GRPO's constant length is the objective's. penalty as in RLOO. A group of one has mean 0 and std 1.
    Shao et al. 2024, DeepSeekMath, arXiv 2402.03300; Liu et al. 2025, Dr.GRPO, arXiv 2503.20783.
    """

    columns = frozenset({"advantages"})

    divide_by_std: bool
    epsilon: float
    penalty: str
    score_clip: Sequence[float] | None

    needs = frozenset({"group"})

    def __post_init__(self) -> None:
        positive("epsilon", self.epsilon)
        one_of("penalty", self.penalty, PENALTIES)
        bounds("score_clip", self.score_clip)

    @property
    def scale_free(self) -> Literal[False] | None:
        """A score_clip may hide the factor."""
        return False if self.score_clip is None and not self.divide_by_std else None

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages."""
        scored = ~episodes.scores.isnan()
        shaped = group_normalised(
            totals(episodes, self.penalty), episodes, scored, divide_by_std=self.divide_by_std, epsilon=self.epsilon
        )
        advantages = spread(clipped(shaped, scored, self.score_clip), episodes, self.penalty)
        return estimate(advantages, episodes, scored, group_metrics(episodes, scored))


@dataclass(frozen=True)
class ReinforcePlusPlus(Advantage):
    """Reward to go, or with group_baseline the score minus its group mean, whitened over all tokens of the rollout.

    variance: what the whitening divides by, see whitened. verl@b178a3c: sample; its baseline form has the penalties
    in_score. OpenRLHF@3c3be62 (reinforce, reinforce_baseline): population, after_baseline.
    Hu et al. 2025, REINFORCE++, arXiv 2501.03262.
    """

    columns = frozenset({"advantages"})

    gamma: float
    group_baseline: bool
    penalty: str
    score_clip: Sequence[float] | None
    variance: str

    @property
    def needs(self) -> frozenset[str]:
        """A group only for its baseline."""
        return frozenset({"group"} if self.group_baseline else ())

    def __post_init__(self) -> None:
        within("gamma", self.gamma, 0, 1)
        one_of("penalty", self.penalty, PENALTIES)
        bounds("score_clip", self.score_clip)
        one_of("variance", self.variance, VARIANCES)
        if self.group_baseline and self.gamma != 1:
            raise ValueError(
                f"advantage.gamma={self.gamma}: a group baseline is one number for all tokens; "
                "use 1, or advantage.group_baseline=false"
            )
        if not self.group_baseline and self.penalty == "in_score":
            raise ValueError(
                "advantage.penalty=in_score: without a group baseline penalties belong to their tokens; "
                "use after_baseline"
            )

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages."""
        scored = ~episodes.scores.isnan()
        shaped = totals(episodes, self.penalty)
        if self.group_baseline:
            shaped = group_centred(shaped, episodes, scored)
        returns = spread(clipped(shaped, scored, self.score_clip), episodes, self.penalty, self.gamma)
        return estimate(whitened(returns, scored[episodes.row], self.variance), episodes, scored)


def group_centred(values: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
    """value minus the group mean [N]; the value itself in a group of one."""
    return group_normalised(values, episodes, scored, divide_by_std=False, epsilon=0.0)


def totals(episodes: Episodes, penalty: str) -> Tensor:
    """Scores [N], with the sum of the completion's penalties for penalty in_score."""
    if penalty == "after_baseline" or episodes.penalties is None:
        return episodes.scores
    return episodes.scores + row_sums(episodes.penalties, episodes.row, len(episodes.scores))


def clipped(shaped: Tensor, scored: Tensor, score_clip: Sequence[float] | None) -> Tensor:
    """Shaped scores [N] within their bounds, 0 where there is no score."""
    shaped = torch.where(scored, shaped, 0.0)
    return shaped if score_clip is None else shaped.clamp(score_clip[0], score_clip[1])


def spread(shaped: Tensor, episodes: Episodes, penalty: str, gamma: float = 1.0) -> Tensor:
    """Shaped scores [N] as advantages of tokens [C]; penalties that are not in the score are cumulated here."""
    if penalty == "in_score":
        return shaped[episodes.row]
    return to_go(penalties(episodes) + at_last(shaped, episodes), episodes, gamma)
