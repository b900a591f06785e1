"""The data that moves between the parts: frozen, shaped, without behaviour.

Axis letters used in the whole package: T tokens of the stream, C targets, N sequences, P pairs, S attention
segments, V vocabulary, H hidden size, L tokens of one row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Unit = Literal["pair", "row", "token"]
Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True)
class Row:
    """One tokenised sequence and the tokens of it that the policy is to answer for."""

    token_ids: np.ndarray  # [L] int32
    targets: np.ndarray  # [L] bool; True where the policy wrote the token. targets[0] is False


@dataclass(frozen=True)
class Pair:
    """Two sequences of which one is preferred; `source` is "file:line" of the line it came from."""

    chosen: Row
    rejected: Row
    source: str
    origin: str  # free label of how the completions were made, for metrics by origin


@dataclass(frozen=True)
class PackedBatch:
    """N sequences as one stream of tokens.

    shared, packed: every token stands in the stream once, `segments` says who attends to whom.
    padded: the stream is N rows of equal length one after the other, `padded_shape` says how to fold it.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    segments: tuple[tuple[int, int, int, int], ...]  # [S] query span, prefix span it also attends to
    padded_shape: tuple[int, int] | None  # (N, longest) in the padded layout, else None
    row_lengths: tuple[int, ...]  # [N] tokens of each sequence, shared ones counted for each owner
    target_index: Tensor  # [C] int64, the stream position whose hidden state predicts the target
    target_ids: Tensor  # [C] int64
    row: Tensor  # [C] int64, the sequence a target belongs to; ascending
    lengths: Tensor  # [N] int64, number of targets of each sequence
    pairs: Tensor  # [P, 2] int64, chosen and rejected sequence
    reference_token_logps: Tensor | None  # [C] float32, when cached
    sources: tuple[str, ...]  # [P]
    origins: tuple[str, ...]  # [P]


@dataclass(frozen=True)
class Stats:
    """What an objective may know of a network's opinion on a batch."""

    token_logps: Tensor  # [C] float32, log p(target)
    logps: Tensor  # [N] float32, summed over the targets of a sequence
    lengths: Tensor  # [N] int64
    row: Tensor  # [C] int64
    log_collision: Tensor | None = None  # [C] log sum_v p(v)^2, no gradient
    log_max: Tensor | None = None  # [C] log max_v p(v), no gradient
    entropy: Tensor | None = None  # [C] nats, no gradient


@dataclass(frozen=True)
class Term:
    """One additive part of a loss, not reduced: the loop divides by the global count of its unit."""

    losses: Tensor  # [P], [N] or [C], to be minimised
    unit: Unit
    weight: float = 1.0


@dataclass(frozen=True)
class Losses:
    """What an objective returns. Each metric is a vector over pairs; the loop averages over the global batch."""

    terms: tuple[Term, ...]
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [P], detached
    by_origin: tuple[str, ...] = ()  # metrics that are also averaged over the pairs of each origin
