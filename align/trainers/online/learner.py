"""From completions with rewards to moved weights: columns that the objective reads, advantages, optimiser steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from align.advantages.base import Advantage
from align.advantages.kl import kl_coefficient
from align.config import OnlineConfig
from align.engine.local import learning_rate
from align.jsons import Json
from align.trainers.experience import Group, episodes, with_columns
from align.trainers.loop import TrainContext, train_step
from align.trainers.online.values import Forward, flat, own, values
from align.trainers.session import Session
from align.types import Example

if TYPE_CHECKING:
    from align.trainers.composing import Composing


class Learner:
    """Updates the policy from groups of completions: log-probs, advantages, optimiser steps.

    reference: of the KL in the reward, or of the objective. selective: whether activation checkpointing is selective.
    """

    def __init__(
        self,
        session: Session,
        context: TrainContext,
        advantage: Advantage,
        reference: Forward | None,
        composing: Composing | None,
        schedule_steps: int,
        selective: bool = False,
    ):
        assert isinstance(session.config.trainer, OnlineConfig)
        self.session = session
        self.trainer = t = session.config.trainer
        self.context = context
        self.advantage = advantage
        self.reference = reference
        self.composing = composing
        self.schedule_steps = schedule_steps
        self.single_step = t.ppo_epochs * t.num_minibatches == 1
        self.old_logps = t.old_logps
        if self.old_logps == "auto":
            engine = self.single_step and t.kl_in_reward > 0
            self.old_logps = "engine" if engine else "none" if self.single_step else "trainer"
        self.kl_coefficient = t.kl_in_reward  # moves with trainer.kl_target
        # shards of two gradients cannot be gathered at once; a graph of selective checkpointing serves for one backward
        beside = self.single_step and not context.engine.sharded and not selective
        self.influences = None if composing is None else composing.measuring(context, beside, session.signals.check)

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
            nonempty = [gap.sum(dtype=np.float64) for gap in gaps if len(gap)]
            if nonempty:
                metrics["kl/reference"] = float(np.mean(nonempty))
            if self.trainer.kl_in_reward > 0:
                penalties = [-self.kl_coefficient * gap for gap in gaps]
        if "old_logps" in columns and engine is not None:
            apart = np.concatenate([np.abs(a - b) for a, b in zip(columns["old_logps"], engine, strict=True)])
            metrics["rollout/sampled_logp_diff_max"] = float(apart.max()) if len(apart) else 0.0
        estimator_input = episodes(groups, rows, self.advantage.needs, penalties, critic)
        if self.composing is None:
            estimate = self.advantage(estimator_input)
        else:
            assert self.influences is not None
            estimate, composed = self.composing.estimate(
                groups, estimator_input, partial(self.influences.before, parts, columns)
            )
            metrics |= composed
        return with_columns(parts, estimate, columns), metrics | estimate.metrics

    def _columns(self, parts: list[Example]) -> tuple[dict[str, Sequence[np.ndarray]], list[np.ndarray] | None]:
        """Log-probs of the reference and of the policy that drew, and the value head's outputs, as far as asked for."""
        session, context = self.session, self.context
        columns: dict[str, Sequence[np.ndarray]] = {}
        if self.reference is not None:
            columns["reference_logps"] = flat(values(session, context, self.reference, parts)["token_logps"])
        critic = "values" in self.advantage.needs
        if self.old_logps != "trainer" and not critic:
            return columns, None
        needs = frozenset({"values"} if critic else ())
        names = ("token_logps", "values") if critic else ("token_logps",)
        found = values(session, context, own(context, needs), parts, names)
        if self.old_logps == "trainer":
            columns["old_logps"] = flat(found["token_logps"])
        return columns, flat(found["values"]) if critic else None

    def update(self, step: int, parts: list[Example], num_prompts: int) -> dict[str, float]:
        """One optimiser step for each minibatch; metrics are their means. The examples of a prompt, as many as its
        completions need, stay together: what a minibatch holds does not depend on the size of micro-batches."""
        t, lr = self.trainer, self.rate(step)
        each = len(parts) // num_prompts
        hook = None if self.influences is None else self.influences.hook(parts)
        parts = parts if hook is None else hook.examples
        rows = []
        for epoch in range(t.ppo_epochs):
            order = np.arange(num_prompts)
            if not self.single_step:
                order = np.random.default_rng([self.session.config.seed, step, epoch]).permutation(num_prompts)
            for chosen in np.array_split(order, min(t.num_minibatches, num_prompts)):
                batch = [p for i in chosen for p in parts[i * each : (i + 1) * each]]
                rows.append(train_step(self.context, batch, lr, hook))
        keys = dict.fromkeys(k for row in rows for k in row)
        return {k: float(np.mean([row[k] for row in rows if k in row])) for k in keys}

    def learnt(self, row: Json) -> dict[str, float]:
        """The weights have moved: tell the composer, and move the coefficient of the KL; returns their metrics."""
        out: dict[str, float] = {}
        if self.composing is not None and self.influences is not None:
            out |= self.composing.learnt(self.influences.measured())
        if self.trainer.kl_target is not None:
            out["kl/coefficient"] = self.kl_coefficient
            if "kl/reference" in row:  # not where nothing was said
                self.kl_coefficient = kl_coefficient(self.kl_coefficient, row["kl/reference"], self.trainer.kl_target)
        return out
