"""What watches the loop of every trainer: a class for each thing, told of steps, evaluations and checkpoints.

An observer is told of a step when its weights have moved, and of its evaluation and row when nothing can stop the step
any more. What it remembers is in the checkpoint, so that it goes on after any kill as if there had been none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from align import build, checkpoint
from align.engine.world import by_lead
from align.jsons import Fields, Json
from align.trainers.callbacks import Callback, Running
from align.trainers.session import Session
from align.trainers.trained import Whole

Form = Callable[[], Json]


class Written(Protocol):
    """A model that can be written in Hugging Face form, as it is; see Whole.write."""

    def write(self, target: Path, summary: Json, form: Json | None = None) -> None:
        """All processes must ask."""
        ...


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


class Exports(Observer):
    """The model in Hugging Face form at some steps, see trainer.export_every and trainer.export_at."""

    def __init__(self, session: Session, whole: Whole, form: Form | None):
        self.session = session
        self.whole = whole
        self.form = form
        self.folder = session.out.path / "exports"

    def start(self, number: int) -> None:
        """What a start that was killed had written later is written again."""
        if self.session.world.lead:
            checkpoint.clean(self.folder)
            for path in checkpoint.steps(self.folder):
                if path.name > f"step-{number:06d}":
                    checkpoint.remove(path)

    def closed(self, number: int, row: Fields) -> None:  # noqa: ARG002
        """See Observer."""
        t = self.session.config.trainer
        if number in (t.export_at or ()) or (t.export_every is not None and number % t.export_every == 0):
            export(self.whole, self.form, self.folder, number)


def export(whole: Written, form: Form | None, folder: Path, number: int) -> None:
    """The model as it is, in a directory of its step."""
    whole.write(folder / f"step-{number:06d}", _card(number), None if form is None else form())


def _card(number: int) -> Json:
    return {"step": number, "metrics": {}, "kl": None, "heldout": ""}


class Best(Observer):
    """The model of the best evaluation, see trainer.keep_best, and the end of a run that gets no better."""

    name = "best"

    def __init__(self, session: Session, whole: Written, form: Form | None, metric: str):
        self.session = session
        self.whole = whole
        self.form = form
        self.metric = metric
        self.sign = -1.0 if any(word in metric for word in ("loss", "kl")) else 1.0
        self.folder = session.out.path / "best"
        self.value: float | None = None
        self.step = 0
        self.waited = 0  # evaluations since then

    @property
    def stops(self) -> bool:  # type: ignore[override]
        """See Observer."""
        limit = self.session.config.trainer.stop_after
        return limit is not None and self.waited >= limit

    def start(self, number: int) -> None:
        """What a start that was killed had found later is forgotten."""
        self.saved(number)

    def evaluated(self, number: int, found: Fields) -> None:
        """See Observer. Raises ValueError for a metric that the evaluation has not."""
        if self.metric not in found:
            raise ValueError(f"trainer.keep_best={self.metric}: an evaluation has {', '.join(sorted(found))}")
        value = float(found[self.metric])
        if self.value is not None and not self.sign * value > self.sign * self.value:
            self.waited += 1
            return
        self.value, self.step, self.waited = value, number, 0
        export(self.whole, self.form, self.folder, number)

    def saved(self, number: int) -> None:  # noqa: ARG002
        """The best ones of before are removed once a checkpoint knows of the better one."""
        if self.session.world.lead:
            checkpoint.clean(self.folder)
            for path in checkpoint.steps(self.folder):
                if path.name != f"step-{self.step:06d}":
                    checkpoint.remove(path)

    def state(self) -> Json:
        """See Observer."""
        return {"value": self.value, "step": self.step, "waited": self.waited, "stopped": self.stops}

    def restore(self, state: Fields, directory: Path) -> None:  # noqa: ARG002
        """See Observer."""
        self.value, self.step, self.waited = state["value"], state["step"], state["waited"]

    def summary(self) -> Json:
        """See Observer."""
        if self.value is None:
            return {}
        best = {"metric": self.metric, "value": self.value, "step": self.step, "stopped_early": self.stops}
        return {"best": best | {"path": f"best/step-{self.step:06d}"}}


class Average(Observer):
    """An exponential average of the trained weights, float32, in the lead's memory, see trainer.ema."""

    name = "ema"
    file = "ema.safetensors"  # of a checkpoint

    def __init__(self, session: Session, whole: Whole, form: Form | None, decay: float):
        self.session = session
        self.whole = whole
        self.form = form
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def start(self, number: int) -> None:  # noqa: ARG002
        """It begins with the weights that the run starts from."""
        if not self.session.world.share(bool(self.weights)):
            self._follow(lambda name, weight: self.weights.update({name: weight.detach().float().clone()}))

    def stepped(self, number: int, row: Fields) -> None:  # noqa: ARG002
        """See Observer."""
        self._follow(lambda name, weight: self.weights[name].lerp_(weight.detach().float(), 1 - self.decay))

    def _follow(self, take: Callable[[str, Tensor], object]) -> None:
        """All processes take part in gathering, the lead alone keeps what it is given."""
        engine = self.whole.engine
        for name, weight in engine.weights():
            if self.session.world.lead and name in engine.parameters:
                take(name, weight)

    def state(self) -> Json:
        """See Observer."""
        return {"decay": self.decay}

    def write(self, directory: Path) -> None:
        """See Observer."""
        if self.session.world.lead:
            save_file({name: weight.contiguous() for name, weight in self.weights.items()}, directory / self.file)

    def restore(self, state: Fields, directory: Path) -> None:  # noqa: ARG002
        """See Observer."""
        if self.session.world.lead:
            self.weights.update(load_file(directory / self.file, str(self.whole.engine.policy.device)))

    def end(self, summary: Fields) -> None:
        """See Observer. What is known of the last weights' scores is not known of these."""
        form = (
            None if self.form is None else {k: v for k, v in self.form().items() if k not in ("mean", "std", "count")}
        )
        self.whole.write_of(self.weights, self.session.out.path / "ema", _card(summary["step"]), form)


class Idle(Observer):
    """Says of a run that it learns nothing, after some such steps in a row and at its end."""

    name = "idle"
    patience = 5  # one step may have drawn prompts that are all too easy

    def __init__(self, session: Session):
        self.session = session
        self.all = 0  # steps
        self.idle = 0
        self.streak = 0
        self.why = ""
        self.told = False

    def stepped(self, number: int, row: Fields) -> None:
        """See Observer."""
        why = _idle(row)
        self.all += 1
        if not why:
            self.streak = 0
            return
        self.idle, self.streak, self.why = self.idle + 1, self.streak + 1, why
        if self.streak == self.patience and not self.told:
            self.told = True
            self.session.log.say(f"warning: step {number}: nothing was learnt in {self.streak} steps: {why}")

    def state(self) -> Json:
        """See Observer."""
        return {"all": self.all, "idle": self.idle, "streak": self.streak, "why": self.why, "told": self.told}

    def restore(self, state: Fields, directory: Path) -> None:  # noqa: ARG002
        """See Observer."""
        self.all, self.idle, self.streak = state["all"], state["idle"], state["streak"]
        self.why, self.told = state["why"], state["told"]

    def summary(self) -> Json:
        """See Observer."""
        if not self.told and (self.idle < self.all or self.all == 0):
            return {}
        return {"nothing_learnt": {"steps": self.idle, "of": self.all, "why": self.why}}


def _idle(row: Fields) -> str:
    """Why a step taught nothing; empty where it taught."""
    if row.get("tokens/targets") == 0:
        return "all completions are masked"
    if row.get("rollout/settled_prompts") == 1:
        return "all completions of each prompt got the same reward"
    return "the gradient is 0" if row.get("optimizer/gradient_norm") == 0 else ""


class Told(Observer):
    """The group callbacks: the lead tells each of them; what one raises ends the run."""

    def __init__(self, session: Session, callbacks: Sequence[Callback], run: Running):
        self.session = session
        self.callbacks = callbacks
        self.run = run

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


def observers_of(session: Session, whole: Whole, num_steps: int, form: Form | None = None) -> list[Observer]:
    """Those that the settings ask for. whole: what is trained; form: what is written beside a reward model."""
    t = session.config.trainer
    out: list[Observer] = [Retention(session), Idle(session)]
    if t.ema is not None:
        out.append(Average(session, whole, form, t.ema))
    if t.keep_best is not None:
        out.append(Best(session, whole, form, t.keep_best))
    if t.export_every is not None or t.export_at:
        out.append(Exports(session, whole, form))
    made = build.callbacks(session.config)
    if made:
        policy = whole.engine.policy
        out.append(Told(session, made, Running(session.out.path, session.config, 0, num_steps, policy)))
    return out
