"""What watches the loop of every trainer: a class for each thing, told of steps, evaluations and checkpoints.

An observer is told of a step when its weights have moved, and of its evaluation and row when nothing can stop the step
any more. What it remembers is in the checkpoint, so that it goes on after any kill as if there had been none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align import checkpoint
from align.trainers.session import Session
from align.trainers.trained import Whole

Form = Callable[[], dict[str, Any]]


OBSERVERS = "observers"  # their key in a checkpoint's progress; other keys are the loop's and the task's


class Observer:
    """Does nothing. name: the key of what it remembers. stops: whether it wants no further step."""

    name = ""
    stops = False

    def start(self, number: int) -> None:
        """Before the first step that is still to be done; `number` are done and, unless it is 0, restored."""

    def stepped(self, number: int, row: Mapping[str, Any]) -> None:
        """A step's weights have moved. row: its metrics so far."""

    def evaluated(self, number: int, found: Mapping[str, Any]) -> None:
        """Metrics of held-out data."""

    def closed(self, number: int, row: Mapping[str, Any]) -> None:
        """A step is done with its evaluation; its row is about to be written."""

    def saved(self, number: int) -> None:
        """There is a checkpoint of a step."""

    def state(self) -> dict[str, Any]:
        """What it must remember: JSON; empty where there is nothing."""
        return {}

    def restore(self, state: Mapping[str, Any], directory: Path) -> None:
        """The inverse. directory: the checkpoint's, with what `write` put there."""

    def write(self, directory: Path) -> None:
        """This process's tensors into a checkpoint."""

    def summary(self) -> dict[str, Any]:
        """What summary.json says of it."""
        return {}

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is complete but for summary.json; told again if it is killed before that is written."""


class Retention(Observer):
    """Removes old checkpoints, see trainer.keep_checkpoints."""

    def __init__(self, session: Session, keep: int | None = None):
        self.session = session
        self.keep = keep or session.config.trainer.keep_checkpoints

    def saved(self, number: int) -> None:  # noqa: ARG002
        """See Observer."""
        if self.session.world.lead:
            checkpoint.retain(self.session.out.checkpoints, self.keep)


def observers_of(session: Session, whole: Whole | None = None, form: Form | None = None) -> list[Observer]:  # noqa: ARG001
    """Those that the settings ask for. whole: what is trained; form: what is written beside a reward model."""
    return [Retention(session)]
