"""Rewards of a completion's length and form alone: what it says does not count. Lengths are tokens the policy wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

from align.rewards.base import Conversation
from align.rewards.functions import repeated_part, words


class SoftOverlong:
    """DAPO's soft overlong punishment, in [-1, 0].

        0                                      length <= max_tokens - buffer_tokens
        (max_tokens - buffer_tokens - length) / buffer_tokens   up to max_tokens
        -1                                     beyond

    max_tokens: the rollout's limit; buffer_tokens: the last tokens before it, over which the punishment grows; both
    > 0, buffer_tokens <= max_tokens.
    Yu et al. 2025, DAPO, section 3.4; arXiv 2503.14476 (L_max, L_cache). Differs from the paper: none known.
    """

    def __init__(self, *, max_tokens: int, buffer_tokens: int):
        if not 0 < buffer_tokens <= max_tokens:
            raise ValueError(f"buffer_tokens={buffer_tokens}: must be from 1 to max_tokens={max_tokens}")
        self.max_tokens = max_tokens
        self.buffer_tokens = buffer_tokens

    def __call__(self, completion: str, token_ids: Sequence[int]) -> float:
        """The punishment of a completion."""
        over = num_tokens(completion, token_ids) - (self.max_tokens - self.buffer_tokens)
        return -min(1.0, max(0, over) / self.buffer_tokens)


class TargetLength:
    """Minus the distance of a completion's length from `tokens`, over `width` (> 0, tokens), at least -1."""

    def __init__(self, *, tokens: int, width: float):
        if tokens < 0 or not 0 < width < float("inf"):
            raise ValueError(f"tokens={tokens}, width={width}: must be at least 0 and greater than 0")
        self.tokens = tokens
        self.width = width

    def __call__(self, completion: str, token_ids: Sequence[int]) -> float:
        """In [-1, 0]."""
        return -min(1.0, abs(num_tokens(completion, token_ids) - self.tokens) / self.width)


def finished(conversations: Sequence[Conversation]) -> list[float]:
    """1 for each completion that the policy ended by itself, 0 for one that was cut."""
    return [float(c.finished) for c in conversations]


class Format:
    """1 if all of a completion matches a regular expression, else 0. A dot matches line ends too."""

    def __init__(self, *, pattern: str):
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern={pattern}: is no regular expression ({error})") from error

    def __call__(self, completion: str) -> float:
        """1 or 0."""
        return float(self.pattern.fullmatch(completion) is not None)


class Repetition:
    """Minus the part of a completion's runs of `size` words that occurred in it before, in (-1, 0]. size: >= 1."""

    def __init__(self, *, size: int):
        if size < 1:
            raise ValueError(f"size={size}: must be at least 1")
        self.size = size

    def __call__(self, completion: str) -> float:
        """The penalty of a completion."""
        return 0.0 - repeated_part(words(completion), self.size)


def num_tokens(completion: str, token_ids: Sequence[int]) -> int:
    """Length of a completion. Raises ValueError where its tokens are not known."""
    if completion and not token_ids:
        raise ValueError("the completion came without its tokens")
    return len(token_ids)
