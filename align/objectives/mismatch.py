"""Weights that make up for the engine sampling from other probabilities than the trainer computes.

weight = p_trainer / p_engine of the tokens that were drawn, never with a gradient; what is done to weights far from 1
is the choice of a correction. Which loss they multiply is the objective's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from align.deferred import Tensor, torch
from align.objectives.checks import not_negative, one_of, positive_value
from align.sums import row_sums

Level = Literal["token", "sequence"]

# e^20 is beyond any threshold in use; a log-ratio of 100 would be inf in float32 and inf * 0 no number.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Gap:
    """How far trainer and engine are apart on C tokens of N sequences."""

    log_ratio: Tensor  # [C] trainer - engine, nats, no gradient; 0 where the engine gave no number
    dropped: Tensor  # [C] bool, the engine gave NaN or an infinity: such a token has weight 0 and counts in no mean
    row: Tensor  # [C] int64, ascending
    num_rows: int

    def counts(self) -> Tensor:
        """Tokens [N] of each sequence that are not dropped."""
        return row_sums((~self.dropped).to(self.log_ratio.dtype), self.row, self.num_rows)

    def ratios(self, level: Level) -> Tensor:
        """Probability ratios [C] of each token, or of the whole sequence it belongs to."""
        logs = self.log_ratio
        if level == "sequence":
            logs = row_sums(logs, self.row, self.num_rows)[self.row]
        return logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def gap_of(trainer_logps: Tensor, rollout_logps: Tensor, row: Tensor, num_rows: int) -> Gap:
    """The gap on tokens with these log-probs [C]; both at the temperature of the rollout, or both at 1."""
    log_ratio = trainer_logps.detach() - rollout_logps
    dropped = ~rollout_logps.isfinite()
    return Gap(log_ratio.masked_fill(dropped, 0.0), dropped, row, num_rows)


class Correction(Protocol):
    """One option of configs/objective/correction."""

    level: Level  # of the weights, for their mean
    normalise: bool  # the weights of a step are divided by their mean

    def __call__(self, gap: Gap) -> tuple[Tensor, Tensor]:
        """Weights [C] before normalisation and dropped tokens, and where they differ from the plain ratio [C] bool."""
        ...


@dataclass(frozen=True)
class Truncated:
    """The ratio, moved into [low, high] where it is outside.

    level token: the ratio of each token (truncated importance sampling). sequence: the product over the sequence, for
    all its tokens; its log grows with the length, so long sequences end at low or high. low null: no lower limit.
    normalise: the weights of an optimiser step are divided by their mean over tokens (level token) or sequences
    (level sequence), for which the loop runs over the step's examples once more.
    verl@b178a3c (low null, high 2), OpenRLHF@3c3be62 tis, TRL@f2cd577 token_truncate and sequence_truncate.
    """

    level: Level
    low: float | None
    high: float
    normalise: bool

    def __post_init__(self) -> None:
        one_of("objective.correction.level", self.level, ("token", "sequence"))
        _thresholds(self.low, self.high)

    def __call__(self, gap: Gap) -> tuple[Tensor, Tensor]:
        """Weights [C] and whether they were moved [C]."""
        ratios = gap.ratios(self.level)
        return ratios.clamp(self.low, self.high), _outside(ratios, self.low, self.high)


@dataclass(frozen=True)
class Masked:
    """The ratio, or 0 where it is outside [low, high].

    level as in Truncated: token is IcePop (OpenRLHF@3c3be62 icepop, TRL@f2cd577 token_mask), sequence drops whole
    sequences (TRL's sequence_mask, its default with high 3). low null: no lower limit.
    """

    level: Level
    low: float | None
    high: float

    normalise = False

    def __post_init__(self) -> None:
        one_of("objective.correction.level", self.level, ("token", "sequence"))
        _thresholds(self.low, self.high)

    def __call__(self, gap: Gap) -> tuple[Tensor, Tensor]:
        """Weights [C] and whether they are 0 [C]."""
        ratios = gap.ratios(self.level)
        outside = _outside(ratios, self.low, self.high)
        return ratios.masked_fill(outside, 0.0), outside


@dataclass(frozen=True)
class SequenceMeanMasked:
    """The ratio of each token, not limited, or 0 for all of a sequence whose mean ratio is outside [low, high].

    The mean is geometric, exp(mean over its tokens of the log-ratio): no function of the length, so thresholds near 1
    serve. OpenRLHF@3c3be62 seq-mask-tis.
    """

    low: float
    high: float

    level = "token"
    normalise = False

    def __post_init__(self) -> None:
        _thresholds(self.low, self.high)

    def __call__(self, gap: Gap) -> tuple[Tensor, Tensor]:
        """Weights [C] and whether they are 0 [C]."""
        means = row_sums(gap.log_ratio, gap.row, gap.num_rows) / gap.counts().clamp(min=1)
        outside = _outside(means.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), self.low, self.high)[gap.row]
        return gap.ratios("token").masked_fill(outside, 0.0), outside


@dataclass(frozen=True)
class Uncorrected:
    """1 for each token: the engine's log-probs are not read."""

    level = "token"
    normalise = False

    def __call__(self, gap: Gap) -> tuple[Tensor, Tensor]:
        """Ones [C], never changed [C]."""
        return torch.ones_like(gap.log_ratio), torch.zeros_like(gap.dropped)


def correction_weights(correction: Correction, gap: Gap) -> tuple[Tensor, Tensor]:
    """Weights [C] with dropped tokens at 0, not normalised, and where a threshold changed them [C] bool."""
    weights, changed = correction(gap)
    return weights.masked_fill(gap.dropped, 0.0), changed & ~gap.dropped


def weight_totals(correction: Correction, weights: Tensor, gap: Gap) -> tuple[Tensor, Tensor]:
    """Sum of the weights and their number [N each] by sequence: whose quotient over a step is their mean.

    A sequence of which no token is left counts 0.
    """
    counts = gap.counts()
    sums = row_sums(weights, gap.row, gap.num_rows)
    if correction.level == "token":
        return sums, counts
    return sums / counts.clamp(min=1), (counts > 0).to(sums.dtype)


def off_policy_mask(
    advantages: Tensor, policy_logps: Tensor, sampled_logps: Tensor, row: Tensor, num_rows: int, threshold: float
) -> Tensor:
    """0 for the tokens of sequences with a negative advantage that the policy has left behind, else 1. [C]

    Left behind: the mean over tokens of sampled - policy log-prob is above the threshold, nats. sampled_logps: [C] of
    whatever drew the tokens; where they are no number the token counts in no mean. A sequence whose advantages differ
    is judged by their sum. DeepSeek-V3.2 eq. 9 (arXiv 2512.02556), TRL@f2cd577 get_off_policy_mask.
    """
    gap = gap_of(policy_logps, sampled_logps, row, num_rows)
    means = -row_sums(gap.log_ratio, row, num_rows) / gap.counts().clamp(min=1)  # [N]
    left_behind = (row_sums(advantages, row, num_rows) < 0) & (means > threshold)
    return 1.0 - left_behind[row].to(advantages.dtype)


def _outside(ratios: Tensor, low: float | None, high: float) -> Tensor:
    return (ratios > high) | (ratios < (-math.inf if low is None else low))


def _thresholds(low: float | None, high: float) -> None:
    positive_value("objective.correction.high", high)
    if low is not None:
        not_negative("objective.correction.low", low)
        if low >= high:
            raise ValueError(f"objective.correction.low={low}: must be below objective.correction.high={high}")
