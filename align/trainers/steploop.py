"""The one loop that saves: steps, pending rows, signals, evaluations, metrics and checkpoints of every trainer.

A trainer gives it a Task. A step is done as a whole or again: what a task says of itself is read between steps only,
so that a step which a signal or a failure ends leaves no trace in what is saved. A step that is done while its
evaluation is not stands in the checkpoint with its row, which is pending until a later start has closed it.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from align import checkpoint
from align.engine.base import Engine, shape_of
from align.jsons import Fields, Json
from align.rollout.base import EngineFailed
from align.trainers.final import final_table
from align.trainers.observers import OBSERVERS, Observer
from align.trainers.session import Session
from align.trainers.signals import Stopped

Metrics = Json


class Task(ABC):
    """What a trainer does in the loop. Steps are numbered from 1; all processes make the same calls."""

    # besides a signal and a failed engine: after which a step is done again as a whole by the next start
    redone: tuple[type[Exception], ...] = ()
    # whether a step is a training of its own: each has its checkpoint and its line for people, whatever
    # trainer.save_every and log.console_every say
    long: bool = False

    @abstractmethod
    def step(self, number: int) -> Metrics:
        """Do it; returns its metrics. May raise Stopped until the first weight has changed."""

    def close(self, number: int, row: Metrics) -> Metrics:  # noqa: ARG002
        """What follows once the weights have moved, such as a sync; returns the row with what it adds. May be stopped,
        and is then done again."""
        return row

    @property
    def due(self) -> bool:
        """Whether an evaluation is wanted now, whatever trainer.eval_every says."""
        return False

    def evaluate(self, number: int, last: bool) -> Metrics:  # noqa: ARG002
        """Metrics of held-out data, empty without any. May be stopped, and is then done again."""
        return {}

    def state(self) -> Fields:
        """What the next step depends on besides weights and step: JSON."""
        return {}

    def restore(self, progress: Fields) -> None:  # noqa: B027
        """The inverse, from a checkpoint's progress."""

    @abstractmethod
    def console(self, number: int, row: Metrics) -> str:
        """A step's line for people."""


class StepLoop:
    """Takes a run from where it is to its last step.

    fixed: what every checkpoint says of the run. write: puts this process's tensors into a directory. size: about how
    many bytes they have, for a full disk's message.
    """

    def __init__(
        self,
        session: Session,
        num_steps: int,
        state: checkpoint.State | None,
        fixed: Fields,
        observers: Sequence[Observer] = (),
        write: Callable[[Path], None] = lambda _: None,
        size: int | None = None,
    ):
        self.session = session
        self.num_steps = num_steps
        self.fixed = fixed
        self.observers = observers
        self.write = write
        self.size = size
        self.restored = state
        self.number = state.step if state else 0  # of the last step that is done
        self._saved = self.number

    @property
    def over(self) -> bool:
        """Whether no step is left, or an observer wants none."""
        return self.number >= self.num_steps or any(o.stops for o in self.observers)

    def run(self, task: Task) -> int:
        """All steps that are left; returns the number of the last one."""
        pending = self._restore(task)
        self.session.log.keep(self.number - 1 if pending else self.number)
        for observer in self.observers:
            observer.start(self.number)
        if pending:
            self._close(task, pending)
            self._save(self._said(task), None)
        while not self.over:
            row = self._step(task)
            said = self._said(task)
            try:
                self.session.signals.agree()
                self._close(task, row)
            except (Stopped, EngineFailed):
                self._save(said, row)
                raise
            if self.over or task.long or self.number % self.session.config.trainer.save_every == 0:
                self._save(self._said(task), None)
        return self.number

    def summary(self) -> Json:
        """What summary.json says of the loop."""
        out: Json = {}
        for observer in self.observers:
            out |= observer.summary()
        return out

    def end(self, summary: Fields, table: Table | None = None) -> None:
        """final/ is written: say that the run is complete, on disk and to people. table: in place of final_table's."""
        for observer in self.observers:
            observer.end(summary)
        out, log = self.session.out, self.session.log
        out.write_json("summary.json", summary)
        table = table or final_table(dict(summary))
        if table.row_count:  # nothing held out, nothing to tell
            log.console.print(table)
        log.say(f"model {out.final}, evidence {out.path}")

    def bind(self, task: Task) -> None:
        """From here on the settings are what the run is, though no step is done."""
        if self.restored is None and self.number == 0:
            self._save(self._said(task), None)

    def _restore(self, task: Task) -> Metrics | None:
        """Everything as the checkpoint has it; returns the row that is pending."""
        if self.restored is None:
            return None
        progress = self.restored.progress
        task.restore(progress)
        states = progress.get(OBSERVERS, {})  # runs of before there were any have none
        for observer in self.observers:
            if observer.name in states:
                observer.restore(states[observer.name], self.restored.path)
        return progress.get("pending")

    def _said(self, task: Task) -> Json:
        """What is to be saved of the task and the observers, as it is now."""
        states = {o.name: state for o in self.observers if (state := o.state())}
        return json.loads(json.dumps({**task.state(), OBSERVERS: states}))

    def _step(self, task: Task) -> Metrics:
        said = self._said(task)
        try:
            self.session.signals.agree()
            row = task.step(self.number + 1)
        except (Stopped, EngineFailed, *task.redone) as stop:
            # no checkpoint after a failure before the first step: the next start may have other settings
            if self._saved != self.number or (self.number == 0 and isinstance(stop, Stopped)):
                self._save(said, None)
            raise
        self.number += 1
        for observer in self.observers:
            observer.stepped(self.number, row)
        return row

    def _close(self, task: Task, row: Metrics) -> None:
        """Sync, evaluate if it is due, write the row. What may be stopped comes before the first observer."""
        number, config = self.number, self.session.config
        last = number == self.num_steps
        row = task.close(number, dict(row))
        every = config.trainer.eval_every
        found: Metrics = {}
        if last or task.due or (every > 0 and number % every == 0):
            start = time.perf_counter()
            found = task.evaluate(number, last)
            if found:
                row = row | found | {"time/eval_s": time.perf_counter() - start}
        for observer in self.observers:
            if found:
                observer.evaluated(number, found)
            observer.closed(number, row)
        self.session.log.row({"step": number} | row)
        if number % config.log.console_every == 0 or task.long or self.over:
            self.session.log.say(task.console(number, row))

    def _save(self, said: Fields, pending: Metrics | None) -> None:
        """A checkpoint of the step that is done; pending: its row, if it is not written yet."""
        session = self.session
        session.log.flush()

        def write(directory: Path) -> None:
            self.write(directory)
            for observer in self.observers:
                observer.write(directory)

        progress = {**self.fixed, **said, "pending": pending}
        checkpoint.save(session.out.checkpoints, self.number, progress, write, self.size, session.world)
        self._saved = self.number
        for observer in self.observers:
            observer.saved(self.number)


def size_of(engine: Engine) -> int:
    """Bytes of a checkpoint, about: weights and two moments."""
    return 12 * sum(math.prod(shape_of(p)) for p in engine.parameters.values())
