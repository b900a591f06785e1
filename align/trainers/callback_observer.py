"""Calls a user's own callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from align import build
from align.engine.world import by_lead
from align.jsons import Fields
from align.trainers.callbacks import Callback, Running
from align.trainers.observers import Observer
from align.trainers.session import Session


class CallbackObserver(Observer):
    """The group callbacks, called in the lead process; an exception in one ends the run."""

    def __init__(self, session: Session, callbacks: Sequence[Callback], run: Running):
        self.session = session
        self.callbacks = callbacks
        self.run = run

    @classmethod
    def by(cls, session: Session, policy: object, num_steps: int) -> CallbackObserver:
        """Of the settings. Raises ValueError for callbacks that cannot be made."""
        run = Running(session.out.path, session.config, 0, num_steps, policy)
        return cls(session, build.callbacks(session.config), run)

    def _tell(self, tell: Callable[[Callback], None]) -> None:
        by_lead(self.session.world, lambda: [tell(callback) for callback in self.callbacks])

    def start(self, number: int) -> None:
        """See Observer."""
        self._tell(lambda callback: callback.on_start(replace(self.run, step=number)))

    def evaluated(self, number: int, found: Fields) -> None:
        """See Observer."""
        self._tell(lambda callback: callback.on_eval(number, dict(found)))

    def closed(self, number: int, row: Fields) -> None:
        """See Observer."""
        self._tell(lambda callback: callback.on_step(number, dict(row)))

    def end(self, summary: Fields) -> None:
        """See Observer."""
        self._tell(lambda callback: callback.on_end(dict(summary)))
