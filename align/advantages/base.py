"""What an estimator is, and what estimators share: refusals of settings, sums over prompts and completions, rewards to
go, whitening.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from align.deferred import Tensor, torch
from align.types import Episodes, Estimate

PENALTIES = ("in_score", "after_baseline")
VARIANCES = ("sample", "population")


class Advantage(ABC):
    """How the rewards of a whole rollout become the advantages of its tokens."""

    __slots__ = ()

    # Of group (two completions of a prompt or more), greedy, values, steps, answers: what it reads of Episodes beside
    # scores, group, row, truncated and penalties
    needs: frozenset[str] = frozenset()
    # Names of the token columns of an estimate. None: a composer of advantages asks by having some made up
    columns: frozenset[str] | None = None
    # False: a factor on all rewards is one on its advantages. None: a composer asks by having made-up rewards doubled
    scale_free: Literal[False] | None = None

    @abstractmethod
    def __call__(self, episodes: Episodes) -> Estimate:
        """Token columns, "advantages" among them. Scores may be NaN: see Estimate."""


def within(key: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless low <= value <= high and finite."""
    if not low <= value <= high or math.isinf(value):
        bound = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"advantage.{key}={value}: must be {bound}")


def positive(key: str, value: float) -> None:
    """Raises ValueError unless 0 < value < inf."""
    if not 0 < value < math.inf:
        raise ValueError(f"advantage.{key}={value}: must be greater than 0")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"advantage.{key}={value}: must be one of {', '.join(allowed)}")


def bounds(key: str, value: Sequence[float] | None) -> None:
    """Raises ValueError unless value is None or two numbers in ascending order."""
    if value is not None and (len(value) != 2 or not value[0] < value[1]):
        raise ValueError(f"advantage.{key}={list(value)}: must be null or [low, high] with low below high")


def row_sums(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sums [N] of token values [C] over the completions; or [G] of values [N] over the prompts."""
    return values.new_zeros(num_rows).index_add(0, row, values)


def row_lengths(episodes: Episodes) -> Tensor:
    """Tokens of each completion [N] int64."""
    return torch.bincount(episodes.row, minlength=len(episodes.scores))


def positions(episodes: Episodes) -> Tensor:
    """Place of each token in its completion [C] int64, from 0."""
    lengths = row_lengths(episodes)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(len(episodes.row), device=episodes.row.device) - starts[episodes.row]


def fold(values: Tensor, episodes: Episodes, width: int = 0) -> Tensor:
    """Token values [C] as [N, longest or width], zeros at the right end."""
    longest = int(row_lengths(episodes).max()) if len(episodes.row) else 0
    folded = values.new_zeros(len(episodes.scores), max(longest, width))
    folded[episodes.row, positions(episodes)] = values
    return folded


def unfold(folded: Tensor, episodes: Episodes) -> Tensor:
    """The inverse of fold [C]."""
    return folded[episodes.row, positions(episodes)]


def to_go(rewards: Tensor, episodes: Episodes, factor: float) -> Tensor:
    """sum_k>=t factor^(k - t) rewards_k within the completion [C]."""
    folded = fold(rewards, episodes)
    out = torch.empty_like(folded)
    running = folded.new_zeros(len(folded))
    for t in reversed(range(folded.shape[1])):
        running = folded[:, t] + factor * running
        out[:, t] = running
    return unfold(out, episodes)


def at_last(values: Tensor, episodes: Episodes) -> Tensor:
    """values [N] at the last token of each completion, 0 at the others [C]."""
    last = positions(episodes) == row_lengths(episodes)[episodes.row] - 1
    return torch.where(last, values[episodes.row], values.new_zeros(()))


def penalties(episodes: Episodes) -> Tensor:
    """Penalty of each token [C]; zeros where the run has none."""
    if episodes.penalties is not None:
        return episodes.penalties
    return episodes.scores.new_zeros(len(episodes.row))


def num_prompts(episodes: Episodes) -> int:
    """G, of the prompts that have completions."""
    return int(episodes.group.max()) + 1 if len(episodes.group) else 0


def group_counts(episodes: Episodes, scored: Tensor) -> Tensor:
    """Number of scored completions of each prompt [G] float64."""
    return row_sums(scored.to(episodes.scores.dtype), episodes.group, num_prompts(episodes))


def group_means(values: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
    """Mean of values [N] over the scored completions of each prompt [G]; 0 for a prompt without any."""
    low = _smallest(values, episodes, scored)
    shifted = torch.where(scored, values - low[episodes.group], 0.0)
    counts = group_counts(episodes, scored)
    return low + row_sums(shifted, episodes.group, len(counts)) / counts.clamp(min=1)


def deviations(values: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
    """values [N] minus the mean over the scored completions of the prompt; 0 for the others.

    Exactly 0 in a group of equal values: the smallest is taken off first, so that rounding of a mean cannot be
    blown up by a division by a standard deviation of about 0.
    """
    low = _smallest(values, episodes, scored)
    shifted = torch.where(scored, values - low[episodes.group], 0.0)
    counts = group_counts(episodes, scored)
    means = row_sums(shifted, episodes.group, len(counts)) / counts.clamp(min=1)
    return torch.where(scored, shifted - means[episodes.group], 0.0)


def _smallest(values: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
    """Smallest value of the scored completions of each prompt [G]; 0 for a prompt without any."""
    low = values.new_full((num_prompts(episodes),), math.inf)
    low = low.scatter_reduce(0, episodes.group[scored], values[scored], "amin")
    return torch.where(low.isinf(), 0.0, low)


def degenerate(episodes: Episodes, scored: Tensor) -> Tensor:
    """Prompts whose scored completions all have the same score, or that have none or one [G] bool."""
    spread = deviations(episodes.scores, episodes, scored).abs()
    return row_sums(spread, episodes.group, num_prompts(episodes)) == 0


def group_normalised(
    values: Tensor, episodes: Episodes, scored: Tensor, *, divide_by_std: bool, epsilon: float
) -> Tensor:
    """(value - mean) / (std + epsilon) over the prompt's completions [N], std unbiased; without division, value - mean.

    A group of one has mean 0 and std 1 (verl@b178a3c compute_grpo_outcome_advantage).
    """
    counts = group_counts(episodes, scored)
    deviation = deviations(values, episodes, scored)
    alone = counts[episodes.group] == 1
    centred = torch.where(scored & alone, values, deviation)
    if not divide_by_std:
        return centred
    variance = row_sums(deviation**2, episodes.group, len(counts)) / (counts - 1).clamp(min=1)
    std = torch.where(alone, 1.0, variance.sqrt()[episodes.group])
    return centred / (std + epsilon)


def leave_one_out(values: Tensor, episodes: Episodes, scored: Tensor) -> Tensor:
    """value minus the mean of the prompt's other scored completions [N]; the value itself in a group of one."""
    counts = group_counts(episodes, scored)[episodes.group]
    others = deviations(values, episodes, scored) * counts / (counts - 1).clamp(min=1)
    return torch.where(scored & (counts == 1), values, others)


def whitened(values: Tensor, keep: Tensor, variance: str) -> Tensor:
    """(values - mean) / std over the tokens of the mask `keep` [C]; 0 outside, and everywhere if all are equal.

    sample: divided by sqrt(unbiased variance + 1e-8); the means divide by the count + 1e-8 (verl@b178a3c
    masked_whiten). population: by sqrt(max(biased variance, 1e-8)) (OpenRLHF@3c3be62). Over the whole rollout, so
    before any split into mini-batches.
    """
    kept = values[keep]
    out = torch.zeros_like(values)
    if len(kept) < 2 or bool((kept == kept[0]).all()):
        return out
    if variance == "sample":
        count = len(kept) + 1e-8
        centred = kept - kept.sum() / count
        scale = ((centred**2).sum() / count * len(kept) / (len(kept) - 1) + 1e-8).rsqrt()
    else:
        centred = kept - kept.mean()
        scale = (centred**2).mean().clamp(min=1e-8).rsqrt()
    out[keep] = centred * scale
    return out


def estimate(
    advantages: Tensor, episodes: Episodes, scored: Tensor, metrics: dict[str, float] | None = None, **columns: Tensor
) -> Estimate:
    """The estimate with advantages of 0 on completions that are not scored, and what every estimator measures."""
    keep = scored[episodes.row]
    advantages = torch.where(keep, advantages, 0.0)
    kept = advantages[keep]
    common = {"advantage/scored_fraction": float(scored.double().mean())} if len(scored) else {}
    if len(kept):
        common |= {
            "advantage/mean": float(kept.mean()),
            "advantage/std": float(kept.std(correction=0)),
            "advantage/max_abs": float(kept.abs().max()),
        }
    return Estimate({"advantages": advantages, **columns}, common | (metrics or {}))


def group_metrics(episodes: Episodes, scored: Tensor) -> dict[str, float]:
    """Share of prompts with a scored completion from which a group baseline leaves nothing to learn."""
    present = group_counts(episodes, scored) > 0
    if not bool(present.any()):
        return {}
    return {"advantage/degenerate_fraction": float(degenerate(episodes, scored)[present].double().mean())}
