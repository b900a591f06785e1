"""Generalised advantage estimation for PPO with a value head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.advantages.base import (
    VARIANCES,
    Advantage,
    at_last,
    bounds,
    estimate,
    one_of,
    penalties,
    to_go,
    whitened,
    within,
)
from align.advantages.baselines import clipped
from align.deferred import no_grad, torch
from align.types import Episodes, Estimate


@dataclass(frozen=True)
class PPO(Advantage):
    """A_t = sum_k>=t (gamma lam)^(k - t) delta_k, delta_t = r_t + gamma V_(t+1) - V_t; returns = A + V, not whitened.

    r_t: the penalty, at the last token with the score. V after the last token is 0; with bootstrap_truncated the V
    before the last token stands for it where the length limit cut the completion (an approximation: no value of the
    state after that token is known). Tokens that are no targets do not exist here: the next value is that of the next
    target, as in verl@b178a3c; OpenRLHF@3c3be62 puts a value of 0 into such holes.
    Schulman et al. 2016, GAE, arXiv 1506.02438; Schulman et al. 2017, PPO, arXiv 1707.06347.
    """

    columns = frozenset({"advantages", "returns", "old_values"})

    gamma: float
    lam: float
    whiten: str
    score_clip: Sequence[float] | None
    bootstrap_truncated: bool

    needs = frozenset({"values"})

    def __post_init__(self) -> None:
        within("gamma", self.gamma, 0, 1)
        within("lam", self.lam, 0, 1)
        one_of("whiten", self.whiten, ("none", *VARIANCES))
        bounds("score_clip", self.score_clip)

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages, returns, old_values; the returns of a completion without a score are its values."""
        values = episodes.values
        assert values is not None
        scored = ~episodes.scores.isnan()
        keep = scored[episodes.row]
        rewards = penalties(episodes) + at_last(clipped(episodes.scores, scored, self.score_clip), episodes)
        same = torch.zeros_like(keep)
        same[:-1] = episodes.row[1:] == episodes.row[:-1]
        following = torch.where(same, values.roll(-1), 0.0)
        if self.bootstrap_truncated:
            following = torch.where(~same & episodes.truncated[episodes.row], values, following)
        delta = rewards + self.gamma * following - values
        advantages = torch.where(keep, to_go(delta, episodes, self.gamma * self.lam), 0.0)
        returns = advantages + values
        metrics = {}
        if bool(keep.any()):
            spread = float(returns[keep].var(correction=0))
            error = float((returns - values)[keep].var(correction=0))
            if spread > 0:
                metrics["advantage/explained_variance"] = 1 - error / spread
        if self.whiten != "none":
            advantages = whitened(advantages, keep, self.whiten)
        return estimate(advantages, episodes, scored, metrics, returns=returns, old_values=values)
