"""From completions with rewards to moved weights: columns that the objective reads, advantages, optimiser steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from align.advantages.base import Advantage
from align.advantages.kl import kl_coefficient
from align.composers.base import Composer
from align.config import OnlineConfig
from align.engine.local import learning_rate
from align.jsons import Json
from align.trainers import influence
from align.trainers.composing import Composing
from align.trainers.experience import Group, episodes, with_columns
from align.trainers.loop import Trainee, train_step
from align.trainers.online.values import Forward, flat, own, values
from align.trainers.session import Session
from align.types import Estimate, Example


class Learner:
    """Of a trainee, by an estimator of advantages. reference: of the KL in the reward, or of the objective.

    selective: whether activations are partly computed again.
    """

    def __init__(
        self,
        session: Session,
        trainee: Trainee,
        advantage: Advantage,
        reference: Forward | None,
        composing: Composing | None,
        schedule_steps: int,
        selective: bool = False,
    ):
        assert isinstance(session.config.trainer, OnlineConfig)
        self.session = session
        self.trainer = t = session.config.trainer
        self.trainee = trainee
        self.advantage = advantage
        self.reference = reference
        self.composing = composing
        self.schedule_steps = schedule_steps
        self.selective = selective
        self.single_step = t.inner_epochs * t.inner_batches == 1
        self.old_logps = t.old_logps
        if self.old_logps == "auto":
            engine = self.single_step and t.kl_in_reward > 0
            self.old_logps = "engine" if engine else "none" if self.single_step else "trainer"
        self.kl_coefficient = t.kl_in_reward  # moves with trainer.kl_target
        self._objectives: Tensor | None = None  # whose advantages [C, K] the coming update measures
        self._measured: Tensor | None = None  # what it has measured

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(self.session.config.optimizer, step, self.schedule_steps)

    def prepared(self, groups: list[Group], parts: list[Example]) -> tuple[list[Example], dict[str, float]]:
        """The examples with all columns that the objective reads."""
        metrics: dict[str, float] = {}
        columns, critic = self._columns(parts)
        rows = [row for e in parts for row in e.rows]
        engine = [row.columns["rollout_logps"] for row in rows] if "rollout_logps" in rows[0].columns else None
        if self.old_logps == "engine":
            if engine is None:
                raise ValueError("trainer.old_logps=engine: this rollout tells no log-probs; use trainer")
            if not self.single_step:
                columns["old_logps"] = engine
        old = columns.get("old_logps", engine)
        penalties = None
        if self.reference is not None and old is not None:
            gaps = [a - b for a, b in zip(old, columns["reference_logps"], strict=True)]
            spoken = [gap.sum(dtype=np.float64) for gap in gaps if len(gap)]
            if spoken:
                metrics["kl/reference"] = float(np.mean(spoken))
            if self.trainer.kl_in_reward > 0:
                penalties = [-self.kl_coefficient * gap for gap in gaps]
        if "old_logps" in columns and engine is not None:
            apart = np.concatenate([np.abs(a - b) for a, b in zip(columns["old_logps"], engine, strict=True)])
            metrics["rollout/sampled_logp_diff_max"] = float(apart.max()) if len(apart) else 0.0
        told = episodes(groups, rows, self.advantage.needs, penalties, critic)
        if self.composing is None:
            estimate = self.advantage(told)
        else:
            estimate, composed = self.composing.estimate(
                groups, told, lambda *asked: self._influences(parts, columns, *asked)
            )
            metrics |= composed
        return with_columns(parts, estimate, columns), metrics | estimate.metrics

    def _columns(self, parts: list[Example]) -> tuple[dict[str, Sequence[np.ndarray]], list[np.ndarray] | None]:
        """Log-probs of the reference and of the policy that drew, and the value head's outputs, as far as asked for."""
        session, trainee = self.session, self.trainee
        columns: dict[str, Sequence[np.ndarray]] = {}
        if self.reference is not None:
            columns["reference_logps"] = flat(values(session, trainee, self.reference, parts)["token_logps"])
        critic = "values" in self.advantage.needs
        if self.old_logps != "trainer" and not critic:
            return columns, None
        needs = frozenset({"values"} if critic else ())
        names = ("token_logps", "values") if critic else ("token_logps",)
        found = values(session, trainee, own(trainee, needs), parts, names)
        if self.old_logps == "trainer":
            columns["old_logps"] = flat(found["token_logps"])
        return columns, flat(found["values"]) if critic else None

    def _influences(
        self,
        parts: list[Example],
        columns: Json,
        streams: Tensor,
        others: dict[str, Tensor],
        composer: Composer,
    ) -> influence.Influences | None:
        """What the gradients of the composer's objectives have to do with each other, before the update; None where the
        update's own passes serve for it."""
        told_afterwards = composer.apply == "next" and composer.measure == "directional"
        # shards of two gradients cannot be gathered at once; a graph of selective recompute serves for one backward
        if told_afterwards and self.single_step and not self.trainee.engine.sharded and not self.selective:
            self._objectives = streams
            return None
        prepared = with_columns(parts, Estimate(others), columns)  # a value head's loss reads returns
        c, check = composer, self.session.signals.check
        return influence.measure(
            self.trainee, prepared, streams, c.measure, c.max_norm, c.parameters, check, names=c.names
        )

    def update(self, step: int, parts: list[Example], num_prompts: int) -> dict[str, float]:
        """One optimiser step for each inner batch; metrics are their means. The examples of a prompt, as many as its
        completions need, stay together: what an inner batch holds does not depend on the size of micro-batches."""
        t, lr = self.trainer, self.rate(step)
        each = len(parts) // num_prompts
        hook = self._hook(parts)
        parts = parts if hook is None else hook.examples
        rows = []
        for epoch in range(t.inner_epochs):
            order = np.arange(num_prompts)
            if not self.single_step:
                order = np.random.default_rng([self.session.config.seed, step, epoch]).permutation(num_prompts)
            for chosen in np.array_split(order, min(t.inner_batches, num_prompts)):
                batch = [p for i in chosen for p in parts[i * each : (i + 1) * each]]
                rows.append(train_step(self.trainee, batch, lr, hook))
        self._measured = None if hook is None else hook.influences
        keys = dict.fromkeys(k for row in rows for k in row)
        return {k: float(np.mean([row[k] for row in rows if k in row])) for k in keys}

    def _hook(self, parts: list[Example]) -> influence.Directional | None:
        """What the update measures, of the objectives that _influences left to it."""
        if self._objectives is None:
            return None
        assert self.composing is not None
        objectives, self._objectives = self._objectives, None
        pattern = self.composing.composer.parameters
        return influence.Directional(self.trainee, parts, objectives, pattern, self.session.signals.check)

    def learnt(self, row: Json) -> dict[str, float]:
        """The weights have moved: tell the composer, and move the coefficient of the KL; returns their metrics."""
        out = {} if self.composing is None else dict(self.composing.learnt(self._measured))
        if self.trainer.kl_target is not None:
            out["kl/coefficient"] = self.kl_coefficient
            if "kl/reference" in row:  # not where nothing was said
                self.kl_coefficient = kl_coefficient(self.kl_coefficient, row["kl/reference"], self.trainer.kl_target)
        return out
