"""Models that are written besides final/: exports of some steps, the best one, the EMA of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from align import checkpoint
from align.jsons import Fields, Json
from align.trainers.observers import Observer
from align.trainers.session import Session
from align.trainers.trained import FullModel

Form = Callable[[], Json]


class WritableModel(Protocol):
    """A model that can be written in Hugging Face form, as it is; see FullModel.write."""

    def write(self, target: Path, summary: Json, form: Json | None = None) -> None:
        """All processes must ask."""
        ...


class Exports(Observer):
    """The model in Hugging Face form at some steps, see trainer.export_every and trainer.export_at."""

    def __init__(self, session: Session, full_model: FullModel, form: Form | None):
        self.session = session
        self.full_model = full_model
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
            export(self.full_model, self.form, self.folder, number)


def export(full_model: WritableModel, form: Form | None, folder: Path, number: int) -> None:
    """The model as it is, in a directory of its step."""
    full_model.write(folder / f"step-{number:06d}", _card(number), None if form is None else form())


def _card(number: int) -> Json:
    return {"step": number, "metrics": {}, "kl": None, "heldout": ""}


class BestModel(Observer):
    """The model of the best evaluation, see trainer.keep_best, and the end of a run that gets no better."""

    name = "best"

    def __init__(self, session: Session, full_model: WritableModel, form: Form | None, metric: str):
        self.session = session
        self.full_model = full_model
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
        limit = self.session.config.trainer.early_stopping_patience
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
        export(self.full_model, self.form, self.folder, number)

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


class EMA(Observer):
    """An exponential average of the trained weights, float32, in the lead's memory, see trainer.ema."""

    name = "ema"
    file = "ema.safetensors"  # of a checkpoint

    def __init__(self, session: Session, full_model: FullModel, form: Form | None, decay: float):
        self.session = session
        self.full_model = full_model
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
        engine = self.full_model.engine
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
            self.weights.update(load_file(directory / self.file, str(self.full_model.engine.policy.device)))

    def end(self, summary: Fields) -> None:
        """See Observer. What is known of the last weights' scores is not known of these."""
        form = (
            None if self.form is None else {k: v for k, v in self.form().items() if k not in ("mean", "std", "count")}
        )
        self.full_model.write_of(self.weights, self.session.out.path / "ema", _card(summary["step"]), form)


def snapshots_of(session: Session, full_model: FullModel, form: Form | None) -> list[Observer]:
    """Those that the settings ask for. full_model: what is trained; form: the reward_model.json of a reward model."""
    t, out = session.config.trainer, list[Observer]()
    if t.ema is not None:
        out.append(EMA(session, full_model, form, t.ema))
    if t.keep_best is not None:
        out.append(BestModel(session, full_model, form, t.keep_best))
    if t.export_every is not None or t.export_at:
        out.append(Exports(session, full_model, form))
    return out
