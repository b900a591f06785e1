"""What a rollout is: prompts as token ids in, what the policy writes as token ids out. Backends stand beside it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from align.jsons import Tokenizer

Stop = Literal["end", "string", "length"]
Progress = Callable[[Iterable[int], int], Iterable[int]]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Nothing of the model's own generation settings is added to it."""

    max_new_tokens: int  # >= 1
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # in (0, 1]: the likeliest tokens that hold this much probability
    top_k: int = 0  # the k likeliest tokens; 0: all
    stop: tuple[str, ...] = ()  # texts that end a completion; see Completion
    seed: int = 0  # >= 0
    first: int = 0  # place of a call's first prompt among those of the whole draw, of which it has a part

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

    def seed_at(self, prompt: int, sample: int) -> int:
        """The seed of a sample of a call's prompt, by its place: whichever call, process or batch draws it."""
        return seed_of(self.seed, self.first + prompt, sample)

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


@dataclass(frozen=True)
class Host:
    """What a backend gets of the run that it works for.

    directory is the backend's own, for weights and logs. check may raise (a signal came); whoever waits calls it at
    least once a second. progress wraps a loop over parts of the work. say takes a line for people.
    """

    policy: Any  # align.models.policy.Policy, with the weights to start from
    tokenizer: Tokenizer
    directory: Path
    precision: str  # float32 or bfloat16: in what the trainer's matrix products run
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    check: Callable[[], None] = lambda: None
    progress: Progress = lambda items, _: items
    say: Callable[[str], None] = lambda line: None


class EngineFailed(RuntimeError):
    """A backend cannot go on; the message holds its own last words."""


class Rollout(ABC):
    """A backend: built from a Host and the keys of its option of configs/rollout. What it draws for a prompt depends
    on (sampling.seed, place of the prompt in the call, number of the sample), on nothing else in the call but
    rounding."""

    __slots__ = ()

    serves_all: bool = False  # said by the class: one of it is there for all processes of a run
    max_tokens: int | None = None  # of a prompt and its completion together; None: no limit of its own
    # what went wrong and was mended since the start, such as restarts; for the metrics
    counts: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, greedy: bool = False
    ) -> list[list[Completion]]:
        """n completions of each prompt, in order; with `greedy` one more at the end, the likeliest token each time.

        All of them are one batch of requests. Raises ValueError for n > 1 with greedy sampling, for an empty prompt
        and for one that is longer than the engine takes.
        """

    @abstractmethod
    def logps(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of the tokens of each sequence from its start (>= 1) on."""

    @abstractmethod
    def sync(self, policy: object) -> None:
        """From now on generate with this policy's weights as they are now; nothing computed with older ones is kept."""

    def sleep(self) -> None:  # noqa: B027
        """Give up what memory it can while the policy is updated; any other call wakes it."""

    def close(self) -> None:  # noqa: B027
        """Give up memory and processes; a second time there is nothing left to do."""


GREEDY = -1  # the sample number of a prompt's greedy completion


def check_request(prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, greedy: bool) -> None:
    """Raises ValueError for what no backend can do."""
    if sampling.greedy and n + greedy > 1:
        raise ValueError(f"n={n}: greedy completions of a prompt are all the same; use temperature > 0")
    if n + greedy < 1:
        raise ValueError(f"n={n}: must be at least 1")
    if not all(len(p) for p in prompts):
        raise ValueError("a prompt without tokens: there is nothing to continue")


def seed_of(seed: int, *keys: int) -> int:
    """A 63-bit seed for a part of the work that `keys` name, as a backend's request or generator takes it."""
    # with their number: SeedSequence takes no notice of zeros at the end
    state = np.random.SeedSequence([len(keys), seed, *keys]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
