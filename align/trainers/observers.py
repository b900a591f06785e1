"""Observers of the loop of every trainer, called after steps, evaluations and checkpoints.

An observer is called for a step when its weights have changed, and for its evaluation and row when nothing can stop the
step any more. Its state is in the checkpoint, so that a kill makes no difference to it.
"""

from __future__ import annotations

from pathlib import Path

from align import checkpoint
from align.jsons import Fields, Json
from align.trainers.session import Session

OBSERVERS = "observers"  # their key in a checkpoint's progress; other keys are the loop's and the task's


class Observer:
    """Does nothing. name: the key of what it remembers. stops: whether it wants no further step."""

    name = ""
    stops = False

    def start(self, number: int) -> None:
        """Before the first step that is still to be done; `number` are done and, unless it is 0, restored."""

    def stepped(self, number: int, row: Fields) -> None:
        """A step's weights have moved. row: its metrics so far."""

    def evaluated(self, number: int, found: Fields) -> None:
        """Metrics of held-out data."""

    def closed(self, number: int, row: Fields) -> None:
        """A step is done with its evaluation; its row is about to be written."""

    def saved(self, number: int) -> None:
        """There is a checkpoint of a step."""

    def state(self) -> Json:
        """What it must remember: JSON; empty where there is nothing."""
        return {}

    def restore(self, state: Fields, directory: Path) -> None:
        """The inverse. directory: the checkpoint's, with what `write` put there."""

    def write(self, directory: Path) -> None:
        """This process's tensors into a checkpoint."""

    def summary(self) -> Json:
        """What summary.json says of it."""
        return {}

    def end(self, summary: Fields) -> None:
        """The run is complete but for summary.json; told again if it is killed before that is written."""


class Retention(Observer):
    """Removes old checkpoints, see trainer.keep_checkpoints."""

    def __init__(self, session: Session):
        self.session = session

    def saved(self, number: int) -> None:  # noqa: ARG002
        """See Observer."""
        if self.session.world.lead:
            checkpoint.retain(self.session.out.checkpoints, self.session.config.trainer.keep_checkpoints)


class StallDetector(Observer):
    """Warns of a run that learns nothing, after some such steps in a row and at its end."""

    name = "idle"
    patience = 5  # one step may have drawn prompts that are all too easy

    def __init__(self, session: Session):
        self.session = session
        self.all = 0  # steps
        self.idle = 0
        self.streak = 0
        self.why = ""
        self.warned = False

    def stepped(self, number: int, row: Fields) -> None:
        """See Observer."""
        why = _idle(row)
        self.all += 1
        if not why:
            self.streak = 0
            return
        self.idle, self.streak, self.why = self.idle + 1, self.streak + 1, why
        if self.streak == self.patience and not self.warned:
            self.warned = True
            self.session.log.say(f"warning: step {number}: nothing was learnt in {self.streak} steps: {why}")

    def state(self) -> Json:
        """See Observer."""
        return {"all": self.all, "idle": self.idle, "streak": self.streak, "why": self.why, "told": self.warned}

    def restore(self, state: Fields, directory: Path) -> None:  # noqa: ARG002
        """See Observer."""
        self.all, self.idle, self.streak = state["all"], state["idle"], state["streak"]
        self.why, self.warned = state["why"], state["told"]

    def summary(self) -> Json:
        """See Observer."""
        if not self.warned and (self.idle < self.all or self.all == 0):
            return {}
        return {"nothing_learnt": {"steps": self.idle, "of": self.all, "why": self.why}}


def _idle(row: Fields) -> str:
    """Why a step taught nothing; empty where it taught."""
    if row.get("tokens/targets") == 0:
        return "all completions are masked"
    if row.get("rollout/settled_prompts") == 1:
        return "all completions of each prompt got the same reward"
    return "the gradient is 0" if row.get("optimizer/gradient_norm") == 0 else ""
