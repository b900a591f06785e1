"""Which observers a run has: those of every run, and those that its settings ask for, imported where they do."""

from __future__ import annotations

from collections.abc import Callable

from align.jsons import Json
from align.trainers.observers import Observer, Retention, StallDetector
from align.trainers.session import Session
from align.trainers.trained import FullModel


def observers_of(
    session: Session, full_model: FullModel, num_steps: int, form: Callable[[], Json] | None = None
) -> list[Observer]:
    """Those that the settings ask for. full_model: what is trained; form: the reward_model.json of a reward model."""
    t = session.config.trainer
    out: list[Observer] = [Retention(session), StallDetector(session)]
    if any(value is not None for value in (t.ema, t.keep_best, t.export_every, t.export_at)):
        from align.trainers.snapshots import snapshots_of

        out += snapshots_of(session, full_model, form)
    if session.config.callbacks:
        from align.trainers.callback_observer import CallbackObserver

        out.append(CallbackObserver.by(session, full_model.engine.policy, num_steps))
    return out
