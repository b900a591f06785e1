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
from align.trainers.online.heldout import Heldout
from align.trainers.online.learner import Learner
from align.trainers.online.probe import check_sync
from align.trainers.online.sampler import FailureCounts, GroupSampler
from align.trainers.online.values import own, values
from align.trainers.session import Session
from align.trainers.steploop import Metrics, Task
from align.trainers.trained import FullModel
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
        sampler: GroupSampler,
        experience: Experience,
        learner: Learner,
        heldout: Heldout,
        transcripts: Transcripts,
        failure_counts: FailureCounts,
        full_model: FullModel,
        probe: Sequence[Example],
    ):
        assert isinstance(session.config.trainer, OnlineConfig)
        self.session = session
        self.trainer = session.config.trainer
        self.plan = plan
        self.sampler = sampler
        self.experience = experience
        self.learner = learner
        self.composing: Composing | None = learner.composing
        self.heldout = heldout
        self.transcripts = transcripts
        self.failure_counts = failure_counts
        self.full_model = full_model
        self.probe = probe

    def step(self, number: int) -> Metrics:
        """See Task. Signals are heeded until the first weight changes."""
        t, e, learner = self.trainer, self.experience, self.learner
        start = time.perf_counter()
        groups, sampled = self.sampler.of(number)
        row: Metrics = dict(reward_metrics(sampled, e.rewards, self.sampler.zero_variance))
        self._check_missing(number, row, sampled)
        if t.dynamic_sampling > 0:
            row |= {"rollout/drawn_prompts": len(sampled), "rollout/kept_prompts": len(groups)}
        parts = examples(groups, t.truncated, learner.context.layout, learner.context.max_tokens)
        before = time.perf_counter()
        # it may fail, and the step is then done again: not once a composer has learnt from it
        together(self.session.world, e.rollout.sleep)
        if self.composing is not None:
            self.composing.learning_rate = learner.rate(number)
        parts, more = learner.prepared(groups, parts)
        self.transcripts.samples(number, sampled)
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
        self.failure_counts.take()
        return row | {"data/epoch": self.sampler.position / len(self.sampler.train)}

    def _check_missing(self, step: int, row: Metrics, sampled: Sequence[Group]) -> None:
        limit, total = self.trainer.max_missing_fraction, len(sampled) * (self.sampler.n + self.sampler.greedy)
        if row["reward/missing"] > limit * total:
            counts = self.failure_counts.everyone(self.experience.rewards.counts)
            raise RewardsMissing(
                f"step {step}: {row['reward/missing']} of {total} completions have no reward "
                f"(trainer.max_missing_fraction={limit:g}); failures since this start: "
                f"{', '.join(f'{n} {name}' for name, n in counts.items()) or 'none told'}"
            )

    def close(self, number: int, row: Metrics) -> Metrics:
        """Give the new weights to the rollout, and check that it has them."""
        start = time.perf_counter()
        full_model = self.full_model()
        together(self.session.world, lambda: self.experience.rollout.sync(full_model))
        row |= self.check_sync(number)
        synced = time.perf_counter() - start
        parts = ("generate", "score", "reference", "update")
        row["time/sync_s"] = synced
        row["time/step_s"] += synced
        row["time/other_s"] = row["time/step_s"] - synced - sum(row[f"time/{part}_s"] for part in parts)
        return row | self.failure_counts.take()

    def check_sync(self, step: int) -> dict[str, float]:
        """See probe.check_sync."""
        if not self.probe:
            return {}
        here = values(self.session, self.learner.context, own(self.learner.context), self.probe)["token_logps"]
        return check_sync(self.session, self.probe, self.experience.rollout, here, "step", step)

    @property
    def due(self) -> bool:
        """Whether the composer waits for an evaluation."""
        return self.composing is not None and self.composing.due

    def evaluate(self, number: int, last: bool) -> Metrics:
        """See Task."""
        if not self.heldout.prompts:
            return {}
        return {**self.heldout.evaluate(number, last), **self.failure_counts.take()}

    def state(self) -> Fields:
        """See Task."""
        return {
            "position": self.sampler.position,
            "failures": dict(self.failure_counts.failures),
            "composer": None if self.composing is None else self.composing.state_dict(),
            "kl_coefficient": self.learner.kl_coefficient,
        }

    def restore(self, progress: Fields) -> None:
        """See Task."""
        self.sampler.position = progress["position"]
        self.failure_counts.failures.update(progress["failures"])
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
