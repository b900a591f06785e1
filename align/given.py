"""Parts given as objects to align.train: while it runs, settings name them by the dotted path of a function here.

They live in this process. What is written to the run's config.yaml names their class, so that a start with another one
is seen, and so is a command that would need the object.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from align.config import quoted
from align.jsons import Json
from align.rewards.base import Conversation, Reward, StepReward
from align.rewards.worker import Refused, bound_to, call_all, call_each, resolve

if TYPE_CHECKING:
    from align.rewards.build import RewardHost

_parts: Json = {}  # setting -> the object given for it


@contextmanager
def given(parts: Mapping[str, object]) -> Iterator[list[str]]:
    """The words of the settings that these parts take the place of, each good inside only.

    parts: by setting, such as objective or reward.gold. Raises ValueError inside another one.
    """
    if _parts:
        raise ValueError("align.train is running with parts given as objects; one training at a time")
    _parts.update(parts)
    try:
        yield [word for key, part in parts.items() for word in _words(key, part)]
    finally:
        _parts.clear()


def part(*, key: str, of: str) -> Any:
    """The object given for a setting; of: the path of its class. Raises ValueError where none was given."""
    if key not in _parts:
        raise ValueError(f"{key} was given to align.train as an object of {of}, which nobody can make again from here")
    return _parts[key]


class Called(Reward):
    """A reward given as a function: called in the trainer's process as align.rewards.worker calls one in its own.

    There is no deadline and nothing that ends it but itself.
    """

    in_process = True

    def __init__(self, host: RewardHost, *, key: str, of: str):
        self.host = host
        self.counts: dict[str, int] = Counter()
        self._function, self._signature = bound_to(part(key=key, of=of), {})

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward."""
        scores = np.full(len(conversations), math.nan)
        whole = [i for i, c in enumerate(conversations) if not set(self._signature.required) - c.fields.keys()]
        self.counts["missing_column"] += len(conversations) - len(whole)
        asked = [conversations[i] for i in whole]
        if self._signature.style == "each":
            answers: Any = [call_each(self._function, self._signature, c) for c in asked]
        else:
            answers = call_all(self._function, self._signature, asked)
        if isinstance(answers, tuple):  # the call as a whole failed
            answers = [answers] * len(asked)
        for i, answer in zip(whole, answers, strict=True):
            if isinstance(answer, tuple):
                if not self.counts[answer[0]]:
                    self.host.say(f"reward {self.host.name}: {answer[1]}")
                self.counts[answer[0]] += 1
            else:
                scores[i] = answer
        return scores

    def close(self) -> None:
        """Nothing is held."""


class Component:
    """Makes of a setting the Reward that was given for it."""

    in_process = True

    def __new__(cls, host: RewardHost, *, key: str, of: str) -> Any:  # noqa: ARG004
        return part(key=key, of=of)


def _words(key: str, given: object) -> list[str]:
    target = "part"
    if key.startswith("reward."):
        named = _importable(given)
        if named is not None:  # a function of a module runs apart, like one of the command line
            return [f"{key}._target_={named}"]
        target = "Component" if isinstance(given, (Reward, StepReward)) else "Called"
    of = path_of(given if isinstance(given, (type, type(path_of))) else type(given))
    return [f"{key}._target_={__name__}.{target}", f"{key}.key={quoted(key)}", f"{key}.of={quoted(of)}"]


def _importable(given: object) -> str | None:
    """The dotted path by which any process finds the same function or class; None without one."""
    path = path_of(given) if isinstance(given, (type, type(path_of))) else ""
    if not path or path.startswith("__main__.") or "<" in path:
        return None
    try:
        return path if resolve(path) is given else None
    except Refused:
        return None


def path_of(thing: Any) -> str:
    """module.name of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"
