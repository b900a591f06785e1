"""What a reward is: a named component that gives each completion a number, or NaN where it cannot."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from align.jsons import Fields, Json, Tokenizer

if TYPE_CHECKING:
    import torch

    from align.models.policy import Policy

Message = Json


@dataclass(frozen=True)
class RewardHost:
    """What a component that runs in the trainer's process gets of the run.

    check may raise (a signal came); whoever waits calls it at least once a second. say takes a line for people.
    """

    policy: Policy | None = None  # for components that share its weights; None: there is none
    tokenizer: Tokenizer | None = None  # the policy's
    device: torch.device | str = "cpu"
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    micro_batch_tokens: int = 8192  # padded tokens of a forward
    check: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda line: None
    name: str = ""  # of the component


NEEDS_LORA = (
    "an adapter on the policy's weights needs a policy with LoRA: set lora.rank, or use "
    "_target_=align.rewards.model.RewardModel with a whole model"
)


@dataclass(frozen=True)
class Conversation:
    """A completion with all that a reward may ask of it."""

    prompt: str  # plain text, or the last user message
    completion: str  # without special tokens
    finished: bool  # the policy ended it by itself, within the limit
    messages: tuple[Message, ...] | None = None  # the prompt as a chat; None for plain text
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()  # of the completion, end of turn included
    fields: Fields = field(default_factory=dict)  # other columns of the prompt's row, such as answer


class RewardTarget(ABC):  # noqa: B024
    """What the class of a component says before one is made; functions and other classes have the defaults."""

    __slots__ = ()

    # Made as target(host, **keys) in the trainer's process, a Reward or a StepReward; else in a process of its own,
    # where it is called by the names of its parameters: align.rewards.worker
    in_process: bool = False
    gives_steps: bool = False  # it is a StepReward
    needs_lora: bool = False  # it stands on the weights of the policy, a LoRA model

    @classmethod  # noqa: B027
    def check_keys(cls, **keys: object) -> None:
        """Raises ValueError for keys of which none can be made, as far as that is known without a model. Of a class of
        ours that inherits this one none is made to check settings."""


class Component(RewardTarget):
    """What both kinds of components have."""

    __slots__ = ()

    # failures since the start by reason, such as raised, timeout; for the metrics
    counts: Mapping[str, int] = MappingProxyType({})

    def close(self) -> None:  # noqa: B027
        """Give up processes and memory; a second time there is nothing left to do."""


class Reward(Component):
    """One component."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """[N] float64; NaN where there is none."""


class StepReward(Component):
    """A component that gives rewards of steps instead of a number."""

    __slots__ = ()

    gives_steps = True

    @abstractmethod
    def steps(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """For each completion a reward where a step ends, NaN elsewhere [its tokens] float64; NaN everywhere where
        there is none."""
