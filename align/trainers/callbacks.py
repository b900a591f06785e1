"""What is told of a run while it trains."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any


class Callback(ABC):  # noqa: B024
    """Methods that do nothing: say those that are wanted."""

    __slots__ = ()

    def on_start(self, run: Any) -> None:  # noqa: B027
        """Before the first step of this process; after a resumption once more."""

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:  # noqa: B027
        """An optimiser step is done; metrics: its row of metrics.jsonl."""

    def on_eval(self, step: int, metrics: Mapping[str, Any]) -> None:  # noqa: B027
        """Held-out data were evaluated after that many steps."""

    def on_end(self, summary: Mapping[str, Any]) -> None:  # noqa: B027
        """All steps are done; summary: summary.json."""
