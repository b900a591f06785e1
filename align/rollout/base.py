"""What a rollout is: prompts as token ids in, what the policy writes as token ids out. Backends stand beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

Stop = Literal["end", "string", "length"]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Nothing of the model's own generation settings is added to it."""

    max_new_tokens: int  # >= 1
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # in (0, 1]: the likeliest tokens that hold this much probability
    top_k: int = 0  # the k likeliest tokens; 0: all
    stop: tuple[str, ...] = ()  # texts that end a completion; see Completion
    seed: int = 0  # >= 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or greater")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be greater than 0 and at most 1")
        if self.top_k < 0 or self.seed < 0:
            raise ValueError(f"top_k={self.top_k}, seed={self.seed}: must be at least 0")
        if not all(self.stop):
            raise ValueError("stop: an empty text would end every completion at once")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    def at(self, *keys: int) -> Sampling:
        """The same with a seed of its own for e.g. a chunk and a turn: independent draws, the same ones each time."""
        return replace(self, seed=seed_of(self.seed, *keys))


@dataclass(frozen=True)
class Completion:
    """What a network wrote, token for token.

    stop "end": the last token ended the turn. "string": the last token completed a stop text; tokens are kept as
    they were drawn, so text that this token holds beyond the stop text is part of the completion. "length": cut at
    max_new_tokens. logps: log-probability of each token at temperature 1 without top_p and top_k, whatever was
    drawn with; None where a backend does not tell.
    """

    token_ids: tuple[int, ...]  # the end of turn included
    stop: Stop
    logps: tuple[float, ...] | None = None

    @property
    def finished(self) -> bool:
        """Whether it came to its own end within the limit."""
        return self.stop != "length"


class Rollout(Protocol):
    """A backend. What it draws for a prompt depends on (sampling.seed, place of the prompt in the call, number of
    the sample), on nothing else in the call but rounding."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """n completions of each prompt, in order. Raises ValueError for n > 1 with greedy sampling."""
        ...

    def sync(self, policy: Any) -> None:
        """From now on generate with this policy's weights."""
        ...

    def close(self) -> None:
        """Give up memory and processes."""
        ...


def seed_of(seed: int, *keys: int) -> int:
    """A 63-bit seed for a part of the work that `keys` name, as a backend's request or generator takes it."""
    # with their number: SeedSequence takes no notice of zeros at the end
    state = np.random.SeedSequence([len(keys), seed, *keys]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
