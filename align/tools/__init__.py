"""Tools that a policy may call while it writes: what a tool is. One file per tool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """What a tool answers: the text that the policy is shown, and whether the call failed."""

    text: str
    error: bool


class Tool(ABC):
    """Reads a call out of what the policy wrote, and runs it. Calls are independent and run on several threads."""

    __slots__ = ()

    name: str  # the role of its observations in a conversation

    @abstractmethod
    def find(self, text: str) -> str | None:
        """The call in an emission, or None: then the emission is the final answer."""

    @abstractmethod
    def run(self, call: str) -> Observation:
        """Carries a call out. A call that fails is an observation, not an exception."""
