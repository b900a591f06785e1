"""What a reward is: a named component that gives each completion a number, or NaN where it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A completion with all that a reward may ask of it."""

    prompt: str  # plain text, or the last user message
    completion: str  # without special tokens
    finished: bool  # the policy ended it by itself, within the limit
    messages: tuple[Message, ...] | None = None  # the prompt as a chat; None for plain text
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()  # of the completion, end of turn included
    fields: Mapping[str, Any] = field(default_factory=dict)  # other columns of the prompt's row, such as answer


class Reward(Protocol):
    """One component."""

    counts: dict[str, int]  # failures since the start by reason, such as raised, timeout; for the metrics

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """[N] float64; NaN where there is none."""
        ...

    def close(self) -> None:
        """Give up processes and memory; a second time there is nothing left to do."""
        ...
