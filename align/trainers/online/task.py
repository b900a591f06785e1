"""A step of online training: draw, score, estimate, update; then sync and evaluate.

A step is a function of the weights, the seed and its place among the prompts, so that a killed run does it again as it
was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.config import OnlineConfig
from align.engine.world import together
from align.jsons import Fields
from align.trainers.experience import Experience, Group, examples, reward_metrics
from align.trainers.loop import Plan
from align.trainers.online.draws import Draws, Tally
from align.trainers.online.heldout import Heldout
from align.trainers.online.learner import Learner
from align.trainers.online.probe import prove
from align.trainers.online.values import own, values
from align.trainers.session import Session
from align.trainers.steploop import Metrics, Task
from align.trainers.trained import Whole
from align.trainers.transcripts import Transcripts
from align.types import Example

if TYPE_CHECKING:
    from align.trainers.composing import Composing


class RewardsMissing(ValueError):
    """Too many completions of a step have no reward."""


class Online(Task):
    """The parts of an online run at work."""

    redone = (RewardsMissing,)

    def __init__(
        self,
        session: Session,
        plan: Plan,
        draws: Draws,
        experience: Experience,
        learner: Learner,
        heldout: Heldout,
        transcripts: Transcripts,
        tally: Tally,
        whole: Whole,
        probe: Sequence[Example],
    ):
        assert isinstance(session.config.trainer, OnlineConfig)
        self.session = session
        self.trainer = session.config.trainer
        self.plan = plan
        self.draws = draws
        self.experience = experience
        self.learner = learner
        self.composing: Composing | None = learner.composing
        self.heldout = heldout
        self.transcripts = transcripts
        self.tally = tally
        self.whole = whole
        self.probe = probe

    def step(self, number: int) -> Metrics:
        """See Task. Signals are heeded until the first weight changes."""
        t, e, learner = self.trainer, self.experience, self.learner
        start = time.perf_counter()
        groups, drawn = self.draws.of(number)
        row: Metrics = dict(reward_metrics(drawn, e.rewards, self.draws.settled))
        self._check_missing(number, row, drawn)
        if t.extra_draws > 0:
            row |= {"rollout/drawn_prompts": len(drawn), "rollout/kept_prompts": len(groups)}
        parts = examples(groups, t.truncated, learner.trainee.layout, learner.trainee.max_tokens)
        before = time.perf_counter()
        # it may fail, and the step is then done again: not once a composer has learnt from it
        together(self.session.world, e.rollout.sleep)
        if self.composing is not None:
            self.composing.learning_rate = learner.rate(number)
        parts, more = learner.prepared(groups, parts)
        self.transcripts.samples(number, drawn)
        updating = time.perf_counter()
        row |= more | learner.update(number, parts, len(groups))
        row |= learner.learnt(row)
        end = time.perf_counter()
        row |= {
            "time/generate_s": e.generate_seconds,
            "time/score_s": e.score_seconds,
            "time/reference_s": updating - before,
            "time/update_s": end - updating,
            "time/step_s": end - start,
        }
        e.generate_seconds = e.score_seconds = 0.0
        self.tally.take()
        return row | {"data/epoch": self.draws.position / len(self.draws.train)}

    def _check_missing(self, step: int, row: Metrics, drawn: Sequence[Group]) -> None:
        limit, total = self.trainer.max_missing_fraction, len(drawn) * (self.draws.n + self.draws.greedy)
        if row["reward/missing"] > limit * total:
            counts = self.tally.everyone(self.experience.rewards.counts)
            raise RewardsMissing(
                f"step {step}: {row['reward/missing']} of {total} completions have no reward "
                f"(trainer.max_missing_fraction={limit:g}); failures since this start: "
                f"{', '.join(f'{n} {name}' for name, n in counts.items()) or 'none told'}"
            )

    def close(self, number: int, row: Metrics) -> Metrics:
        """Give the new weights to the rollout, and prove it."""
        start = time.perf_counter()
        whole = self.whole()
        together(self.session.world, lambda: self.experience.rollout.sync(whole))
        row |= self.prove(number)
        synced = time.perf_counter() - start
        parts = ("generate", "score", "reference", "update")
        row["time/sync_s"] = synced
        row["time/step_s"] += synced
        row["time/other_s"] = row["time/step_s"] - synced - sum(row[f"time/{part}_s"] for part in parts)
        return row | self.tally.take()

    def prove(self, step: int) -> dict[str, float]:
        """See probe.prove."""
        if not self.probe:
            return {}
        here = values(self.session, self.learner.trainee, own(self.learner.trainee), self.probe)["token_logps"]
        return prove(self.session, self.probe, self.experience.rollout, here, "step", step)

    @property
    def due(self) -> bool:
        """Whether the composer waits for an evaluation."""
        return self.composing is not None and self.composing.due

    def evaluate(self, number: int, last: bool) -> Metrics:
        """See Task."""
        if not self.heldout.prompts:
            return {}
        return {**self.heldout.evaluate(number, last), **self.tally.take()}

    def state(self) -> Fields:
        """See Task."""
        return {
            "position": self.draws.position,
            "failures": dict(self.tally.failures),
            "composer": None if self.composing is None else self.composing.state_dict(),
            "kl_coefficient": self.learner.kl_coefficient,
        }

    def restore(self, progress: Fields) -> None:
        """See Task."""
        self.draws.position = progress["position"]
        self.tally.failures.update(progress["failures"])
        if self.composing is not None:
            self.composing.load_state_dict(progress["composer"])
        if self.trainer.kl_target is not None:
            self.learner.kl_coefficient = progress["kl_coefficient"]

    def console(self, number: int, row: Metrics) -> str:
        """See Task."""
        left = (self.plan.num_steps - number) * row["time/step_s"]
        parts = [f"step {number}/{self.plan.num_steps}"]
        names = self.experience.rewards.names
        parts += [f"{name} {row[f'reward/{name}']:.3f}" for name in names if f"reward/{name}" in row]
        short = {"kl/reference": "KL", "rollout/tokens": "tokens", "heldout/total_greedy": "held-out"}
        parts += [f"{word} {row[key]:.3g}" for key, word in short.items() if key in row]
        seconds = (f"{part} {row[f'time/{part}_s']:.1f}" for part in ("generate", "score", "update", "sync"))
        return "  ".join([*parts, f"seconds: {', '.join(seconds)}", f"{left:.0f} s left"])
