"""The rounds of a run, each a step of the loop: draw, select, train, then ask what is held out.

A round is a function of the weights it starts from, its prompts, the seed and its number. What it draws is kept below a
key, its training is an offline run in rounds/NN/train: one that was killed comes out the same.
"""

from __future__ import annotations

import time
from pathlib import Path

from align import build
from align.config import Config, IterateConfig, derived, saved_model
from align.jsons import Json
from align.rollout.base import seed_of
from align.trainers import offline, resume
from align.trainers.final import final_table
from align.trainers.iterate.policies import Policies
from align.trainers.iterate.samples import TRAIN
from align.trainers.iterate.sources import Problems, Prompts
from align.trainers.observers import Observer, Retention
from align.trainers.row_cache import RowCache
from align.trainers.session import Session, start
from align.trainers.steploop import Metrics, StepLoop, Task


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    objective = build.objective(config)
    return start(config, command, objective, run)


def run(session: Session) -> int:
    """Everything from prompts to final/; returns the exit code."""
    config, t, log = session.config, session.config.trainer, session.log
    assert isinstance(t, IterateConfig)
    source = Prompts(session) if config.collect is None else Problems(session)
    state = resume.restore_point(session, source.hashes)
    if resume.nothing_left(session, state, t.rounds, "round"):
        return 0
    log.say(f"precision {session.precision_name} ({session.precision_why})")
    done = state.step if state is not None else 0
    policies = Policies(session, source.rows, source.probe, done)
    model_hash = state.progress["model"] if state is not None else ""
    if done == 0 or t.reference == "fixed":
        model_hash = policies.of(0).hash
        resume.check_weights(session, state, model_hash)
    observers: list[Observer] = [Retention(session)]
    if t.keep_best is not None:
        from align.trainers.snapshots import BestModel

        observers.append(BestModel(session, policies, None, t.keep_best))
    loop = StepLoop(session, t.rounds, state, {"data": source.hashes, "model": model_hash}, observers)
    if done:
        log.say(f"resumed {session.out.path} after round {done}")
    else:
        source.before(policies)
    loop.run(Rounds(session, loop, source, policies))
    rows = RowCache(session.out.path, session.world).read("metrics.jsonl") or []
    summary = {
        "step": loop.number,
        "merged": config.merge,
        "seconds": session.seconds(),
        "metrics": {k: v for k, v in rows[-1].items() if k.startswith(("heldout/", "train/")) and v is not None},
        "kl": None,
        **source.summary(policies),
        **loop.summary(),
    }
    final_summary = summary | {"step": sum(row["train/steps"] for row in rows)}  # optimiser steps
    policies.write(session.out.final, final_summary)
    loop.end(summary, final_table(final_summary))
    return 0


class Rounds(Task):
    """Each of a round's phases goes on by itself from where an earlier start left it."""

    due = True  # type: ignore[assignment]
    long = True

    def __init__(self, session: Session, loop: StepLoop, source: Prompts | Problems, policies: Policies):
        assert isinstance(session.config.trainer, IterateConfig)
        self.session = session
        self.config = session.config
        self.trainer = session.config.trainer
        self.loop = loop
        self.source = source
        self.policies = policies

    def step(self, number: int) -> Metrics:
        """See Task."""
        begun = time.perf_counter()
        data, row = self.source.draw(number, self.policies)
        self.loop.bind(self)
        drawn = time.perf_counter()
        row |= {"round": number} | self._train(number, data)
        end = time.perf_counter()
        return row | {"time/train_s": end - drawn, "time/round_s": end - begun}

    def _train(self, number: int, data: Path) -> Metrics:
        """The offline trainer on the round's rows."""
        settings = self._settings(number, data)
        self.session.log.say(f"round {number}/{self.trainer.rounds}: training in {settings.run.dir}")
        # the reference stays: from the second round on it is no longer what the training starts from
        stays = self.trainer.reference == "fixed" and number > 1 and self.config.reference.path is None
        loaded = offline.LoadedModel(self.policies.to_train(), self.session.pretrained if stays else None)
        row = offline.train_part(self.session, settings, loaded, compare=False)
        self.policies.trained(number)
        return row

    def _settings(self, number: int, data: Path) -> Config:
        """Those of a round's training."""
        config, more = self.config, self.trainer.offline_data
        sources = [str(data), *([more] if isinstance(more, str) else more or [])]
        changed: Json = {
            "run.dir": str(self.policies.directory(number) / "train"),
            "seed": seed_of(config.seed, TRAIN, number) % 2**31,
            "merge": config.lora.rank > 0,
            "trainer.precision": self.session.precision_name,
            "trainer.num_samples": 0,
            "data.train": sources if len(sources) > 1 else sources[0],
            "data.heldout_fraction": 0.0,
            "log.wandb": "off",
        }
        rounds_own = (
            "collect",
            "reward",
            "pairs",
            "advantage",
            "composer",
            "trainer.keep_best",
            "trainer.early_stopping_patience",
        )
        data_own = ("heldout", "repeat", "gold", "format", "loader", "columns", "form")  # the rows are written here
        changed |= dict.fromkeys((*rounds_own, *(f"data.{name}" for name in data_own)))
        if number > 1:
            changed["model"] = saved_model(config, self.policies.final(number - 1))
        return derived(config, changed)

    def evaluate(self, number: int, last: bool) -> Metrics:  # noqa: ARG002
        """See Task."""
        return self.source.evaluate(number, self.policies)

    def console(self, number: int, row: Metrics) -> str:
        """See Task."""
        short = {
            "reward/total": "reward",
            "collect/accuracy": "right",
            "data/rows": "rows",
            "heldout/total_greedy": "held-out reward",
            "heldout/solved": "held-out solved",
        }
        parts = [f"{word} {row[key]:.4g}" for key, word in short.items() if row.get(key) is not None]
        times = {s: row[f"time/{s}_s"] for s in ("generate", "train", "eval") if f"time/{s}_s" in row}
        seconds = ", ".join(f"{name} {value:.0f}" for name, value in times.items())
        return "  ".join([f"round {number}/{self.trainer.rounds}", *parts, f"seconds: {seconds}"])
