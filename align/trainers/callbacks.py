"""What of a user's own may be told of a run: the group callbacks, callbacks.NAME._target_=module.Class."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import Config
from align.contracts import adopt
from align.jsons import Fields


@dataclass(frozen=True)
class Running:
    """A run as its callbacks see it."""

    path: Path  # its directory
    config: Config
    step: int  # from which it goes on; 0: a first start
    num_steps: int
    policy: Any  # the network that is trained, in shards with engine=zero3


class Callback(ABC):  # noqa: B024
    """Methods that do nothing: say those that are wanted. The lead process alone calls them; a step that is done again
    after a kill is told again."""

    __slots__ = ()

    def on_start(self, run: Running) -> None:  # noqa: B027
        """Before the first step of this process; after a resumption once more."""

    def on_step(self, step: int, metrics: Fields) -> None:  # noqa: B027
        """An optimiser step is done; metrics: its row of metrics.jsonl."""

    def on_eval(self, step: int, metrics: Fields) -> None:  # noqa: B027
        """Held-out data were evaluated after that many steps; comes before that step's on_step."""

    def on_end(self, summary: Fields) -> None:  # noqa: B027
        """All steps are done and final/ is written; summary: summary.json."""


_CALLS = ("on_start", "on_step", "on_eval", "on_end")


def as_callback(part: object, key: str) -> Callback:
    """See adopt. Raises ValueError, too, for a part that would be told nothing, and for calls that there are not."""
    names = [name for name in dir(part) if name.startswith("on_")]
    made = adopt(part, Callback, key)
    for name in names:
        if name not in _CALLS:
            raise ValueError(f"{key}: {type(part).__name__}.{name} is never called: there are {', '.join(_CALLS)}")
    if not names:
        raise ValueError(f"{key}: {type(part).__name__} has none of {', '.join(_CALLS)}")
    return made
