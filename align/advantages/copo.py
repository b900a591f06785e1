"""COPO: a local advantage within a prompt's group and a global one between prompts, blended by entropy of answers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from align.advantages.base import (
    Advantage,
    degenerate,
    estimate,
    group_counts,
    group_means,
    group_metrics,
    group_normalised,
    num_prompts,
    one_of,
    positive,
)
from align.advantages.baselines import totals
from align.deferred import Tensor, no_grad, torch
from align.types import Episodes, Estimate

BLENDS = ("local", "global", "soft", "forced", "soft_forced", "nonzero", "soft_nonzero")


@dataclass(frozen=True)
class COPO(Advantage):
    """Local: GRPO. Global: R = p (1 - lambda H) of each prompt, (R - mean) / (std + epsilon) over the prompts.

    p: mean score of the prompt's completions; H: entropy of their final answers in bits, compared as texts, None being
    an answer like another; lambda = (1 - 1/n) / log2 n, so that 1 - lambda H is in [1/n, 1]; consistency false: 1.
    The objective's loss is w local + (1 - w) global, w the column local_weight, by `blend`:
    local: 1. global: 0. soft: sigmoid(steepness (H - midpoint)). forced: 0 for a prompt whose scores are all equal,
    else 1. soft_forced: soft times forced. nonzero: 0 where the completion's score is 0, else 1. soft_nonzero: soft
    times nonzero. Penalties enter the local score only. A group of one has H = 0 and counts as all equal; of a single
    prompt the global advantage is 0. The authors' code divides by 0 and gives NaN there, and takes a completion whose
    first token has local advantage 0 for one of an all-equal group.
    COPO, arXiv 2508.04138; hijih/copo-code@095afa5.
    """

    columns = frozenset({"advantages", "global_advantages", "local_weight"})

    blend: str
    midpoint: float
    steepness: float
    consistency: bool
    divide_by_std: bool
    epsilon: float

    needs = frozenset({"answers", "group"})

    def __post_init__(self) -> None:
        one_of("blend", self.blend, BLENDS)
        if not math.isfinite(self.midpoint):
            raise ValueError(f"advantage.midpoint={self.midpoint}: must be a number of bits")
        positive("steepness", self.steepness)
        positive("epsilon", self.epsilon)

    @no_grad
    def __call__(self, episodes: Episodes) -> Estimate:
        """Columns: advantages, global_advantages, local_weight; the last two constant within a completion."""
        scored = ~episodes.scores.isnan()
        local = group_normalised(
            totals(episodes, "in_score"), episodes, scored, divide_by_std=self.divide_by_std, epsilon=self.epsilon
        )
        entropy = answer_entropy(episodes, scored)
        rewards = group_means(episodes.scores, episodes, scored)
        counts = group_counts(episodes, scored)
        if self.consistency:
            many = counts.clamp(min=2)
            rewards = rewards * (1 - (1 - 1 / many) / many.log2() * entropy)
        between = torch.where(scored, _standardised(rewards, counts > 0, self.epsilon)[episodes.group], 0.0)
        weight = self._local_weight(entropy, episodes, scored)
        metrics = group_metrics(episodes, scored)
        if bool(scored.any()):
            metrics |= {
                "advantage/answer_entropy": float(entropy[counts > 0].mean()),
                "advantage/global_reward": float(rewards[counts > 0].mean()),
                "advantage/local_weight": float(weight[scored].mean()),
            }
        row = episodes.row
        return estimate(local[row], episodes, scored, metrics, global_advantages=between[row], local_weight=weight[row])

    def _local_weight(self, entropy: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
        """Weight of the local loss of each completion [N]."""
        if self.blend == "global":
            return torch.zeros_like(episodes.scores)
        weight = torch.ones_like(episodes.scores)
        if self.blend.startswith("soft"):
            weight = torch.sigmoid(self.steepness * (entropy - self.midpoint))[episodes.group]
        if self.blend.endswith("forced"):
            weight = torch.where(degenerate(episodes, scored)[episodes.group], 0.0, weight)
        if self.blend.endswith("nonzero"):
            weight = torch.where(episodes.scores == 0, 0.0, weight)
        return weight


def answer_entropy(episodes: Episodes, scored: Tensor) -> Tensor:
    """Entropy in bits of the answers of each prompt's scored completions [G]."""
    assert episodes.answers is not None
    answers: list[Counter[str | None]] = [Counter() for _ in range(num_prompts(episodes))]
    for group, ok, answer in zip(episodes.group.tolist(), scored.tolist(), episodes.answers, strict=True):
        if ok:
            answers[group][answer] += 1
    return episodes.scores.new_tensor([_entropy(counts) for counts in answers])


def _entropy(counts: Counter[str | None]) -> float:
    total = sum(counts.values())
    return sum(n / total * math.log2(total / n) for n in counts.values())


def _standardised(values: Tensor, present: Tensor, epsilon: float) -> Tensor:
    """(values - mean) / (std + epsilon) over the mask [G], std unbiased; zeros for fewer than two or all equal."""
    kept = values[present]
    out = torch.zeros_like(values)
    if len(kept) < 2 or bool((kept == kept[0]).all()):
        return out
    out[present] = (kept - kept.mean()) / (kept.std() + epsilon)
    return out
