"""The data that moves between the parts: frozen, shaped, without behaviour.

Axis letters used in the whole package: T tokens of the stream, C targets, N sequences, P examples (a pair, or one
labelled or imitated sequence, a ranked list, or the completions of one prompt), R sequences of an example, S attention
segments, V vocabulary, H hidden size, L tokens of one row, G prompts, K components of a reward, D outputs of a score
head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Unit = Literal["example", "row", "token"]
Layout = Literal["shared", "packed", "padded"]
Kind = Literal["pair", "labelled", "single", "ranked", "rollout"]
# Before the name of a component: numbers of a pair that tell its margin of chosen over rejected, and its weight
MARGIN, WEIGHT = "margin/", "weight/"


@dataclass(frozen=True)
class Row:
    """One tokenised sequence and the tokens of it that the policy is to answer for."""

    token_ids: np.ndarray  # [L] int32
    targets: np.ndarray  # [L] bool; True where the policy wrote the token. targets[0] is False
    weights: np.ndarray | None = None  # [L] float32, > 0 at targets: how much each counts; None: 1
    # name -> [number of targets] float32, what is known of each target: advantages, old log-probs, ...
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What a completion is written for, to generate from and to judge by."""

    token_ids: tuple[int, ...]
    text: str  # the plain prompt, or the last user message


@dataclass(frozen=True)
class Example:
    """What one loss is about. `source` is "file:line" of the line it came from.

    kind pair: rows are chosen, rejected, then those an objective asked for by name. ranked: best first, two or more.
    labelled, single: one row.
    """

    rows: tuple[Row, ...]  # [R]
    source: str
    prompt: Prompt
    origin: str = ""  # free label of how the completions were made, for metrics by origin
    label: bool | None = None  # kind labelled: whether the row is desirable
    # rows that are in no loss, of which Objective.step_rows names one: mismatched, the prompt with another's completion
    extras: Mapping[str, Row] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)  # columns of the data that an objective reads


class Extras(dict[str, "Tensor"]):
    """Tensors of a batch or of a network's opinion that few objectives read, by the names in Objective.extras."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f"{name} is not among the extras ({', '.join(self) or 'none'}): an objective names in its extras what it "
            "reads of batch.extras and policy.extras, and has step_values and step_index by its step_rows"
        )


@dataclass(frozen=True)
class VarlenPlan:
    """The segments of a stream as a variable-length kernel asks for them: a segment's keys are its prefix's, then its
    own."""

    queries: Tensor  # [S + 1] int32, where the queries of each segment begin
    keys: Tensor  # [S + 1] int32, the same of its keys
    longest: tuple[int, int]  # queries and keys of a segment
    gather: Tensor | None = None  # [K] int64, the stream position of each key; None: no prefixes, keys are the stream
    own: Tensor | None = None  # [T] int64, where among the keys each token of the stream stands for itself
    prefixes: Tensor | None = None  # [K - T] int64, which keys are those of prefixes


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
    target_weights: Tensor | None  # [C] float32; None: all 1
    row: Tensor  # [C] int64, the sequence a target belongs to; ascending
    lengths: Tensor  # [N] number of targets of each sequence; with weights their sum, float32
    # [P, R] int64, the sequences of each example; a pair's are chosen, rejected. -1 fills up those of a ranked list
    # that is shorter than the batch's longest
    groups: Tensor
    last_index: Tensor  # [N] int64, the stream position of each sequence's last token
    sources: tuple[str, ...]  # [P]
    origins: tuple[str, ...]  # [P]
    labels: Tensor | None = None  # [P] bool
    numbers: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [P] float32
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [C] float32, of rows that carry them
    reference_token_logps: Tensor | None = None  # [C] float32, when cached
    extras: Mapping[str, Tensor] = field(default_factory=Extras)  # what Objective.extras and step_rows ask for
    varlen: VarlenPlan | None = None  # of the segments, where the batch is on a GPU


@dataclass(frozen=True)
class Stats:
    """What an objective may know of a network's opinion on a batch. Of a reward model, which has no opinion on tokens,
    token_logps and logps are empty."""

    token_logps: Tensor  # [C] float32, log p(target), not weighted
    logps: Tensor  # [N] float32, summed over the targets of a sequence, each times its weight
    lengths: Tensor  # [N] number of targets; with weights their sum
    row: Tensor  # [C] int64
    log_collision: Tensor | None = None  # [C] log sum_v p(v)^2, no gradient
    log_max: Tensor | None = None  # [C] log max_v p(v), no gradient
    entropy: Tensor | None = None  # [C] nats, no gradient
    entropy_bonus: Tensor | None = None  # [C] the same numbers with their gradient
    # [C] of the value head, before each target, with their gradient; [C, K] of a head with K > 1 outputs
    values: Tensor | None = None
    scores: Tensor | None = None  # [N, D] float32, of a reward model's head at each sequence's last token
    extras: Mapping[str, Tensor] = field(default_factory=Extras)  # what Objective.extras asks of the network


@dataclass(frozen=True)
class Episodes:
    """N completions of G prompts as an advantage estimator sees them: one stream of rewards, nothing with a gradient.

    The completions of a prompt stand together. Tokens are targets: what the policy wrote, end of turn included.
    """

    scores: Tensor  # [N] float64, reward of each completion; NaN where none could be had
    group: Tensor  # [N] int64, the prompt of each; ascending from 0
    row: Tensor  # [C] int64, the completion a token belongs to; ascending from 0
    truncated: Tensor  # [N] bool, cut at the length limit
    greedy: Tensor | None = None  # [G] float64, reward of each prompt's greedy completion; needs "greedy"
    penalties: Tensor | None = None  # [C] float64, -kl_in_reward * (old - reference) log-prob; None without
    values: Tensor | None = None  # [C] float64, of the value head before each token; needs "values"
    steps: Tensor | None = None  # [C] float64, process reward where a step ends, NaN elsewhere; needs "steps"
    answers: tuple[str | None, ...] | None = None  # [N], extracted final answers; needs "answers"


@dataclass(frozen=True)
class Estimate:
    """What an estimator says: token columns for the objective, "advantages" among them, and what it measured.

    A completion whose score is NaN has advantages of 0 and does not enter any baseline.
    """

    columns: dict[str, Tensor]  # name -> [C] float64
    metrics: dict[str, float] = field(default_factory=dict)  # names below advantage/


@dataclass(frozen=True)
class Term:
    """One additive part of a loss, not reduced: the loop divides by the global count of its unit.

    The count of tokens is the sum of target weights. With `column`, only the rows of that column of `groups` count.
    """

    losses: Tensor  # one per example, row or token of the batch (or of the column), to be minimised
    unit: Unit
    weight: float = 1.0
    column: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"a term of the loss with unit={self.unit!r}: must be {', '.join(get_args(Unit))}")


@dataclass(frozen=True)
class Losses:
    """What an objective returns. A metric is a vector over examples, NaN where it does not apply; the loop averages
    the others over the global batch."""

    terms: tuple[Term, ...]
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [P], detached
    by_origin: tuple[str, ...] = ()  # metrics that are also averaged over the examples of each origin
