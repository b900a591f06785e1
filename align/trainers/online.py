"""`align train` with a policy that learns from what it writes itself: draw, score, estimate, update, sync, again.

Blind to the algorithm: the estimator of advantages and the objective say what they need. A step is a function of the
weights, the seed and its place among the prompts, so that a killed run does it again as it was.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from align import build, checkpoint
from align.advantages.kl import kl_coefficient
from align.config import Config, OnlineConfig
from align.data.prompts import PromptRow, load_prompts, prompts_fingerprint
from align.engine.build import make_engine
from align.engine.local import learning_rate
from align.engine.world import together
from align.evaluate.heldout import heldout_metrics
from align.models import Policy
from align.rewards.build import RewardHost, components
from align.rollout.base import EngineFailed, Sampling
from align.trainers import composing, influence
from align.trainers.anchors import Anchors
from align.trainers.experience import (
    Experience,
    Group,
    episodes,
    examples,
    reward_metrics,
    with_columns,
)
from align.trainers.final import final_table
from align.trainers.loop import Anchor, Plan, Trainee, token_values, train_step
from align.trainers.run import SELF_CHECK_TOLERANCE, Run, SelfCheckError, start
from align.trainers.signals import Stopped
from align.trainers.transcripts import Transcripts
from align.types import Estimate, Example, Prompt, Row

PROBE_PROMPTS = 4  # on which engine and trainer are compared after each sync
ENGINE_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}  # nats per token, see trainer.engine_tolerance
_EVALUATION = 1 << 40  # the seed's key of held-out completions, which no step has


class RewardsMissing(ValueError):
    """Too many completions of a step have no reward."""


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    objective = build.objective(config)
    advantage = build.advantage(config)
    return start(config, command, objective, partial(OnlineTraining, advantage))


class OnlineTraining(Run):
    """Online training, in the order it happens."""

    def __init__(self, advantage: Any, config: Config, *rest: Any):
        super().__init__(config, *rest)
        assert isinstance(config.trainer, OnlineConfig)
        self.advantage = advantage
        self.trainer = config.trainer
        s = config.sampling
        self.sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p, s.top_k, tuple(s.stop), config.seed)
        self.single_step = self.trainer.inner_epochs * self.trainer.inner_batches == 1
        self.old_logps = self.trainer.old_logps
        if self.old_logps == "auto":
            engine = self.single_step and self.trainer.kl_in_reward > 0
            self.old_logps = "engine" if engine else "none" if self.single_step else "trainer"
        self.kl_coefficient = self.trainer.kl_in_reward  # moves with trainer.kl_target
        self.composing = composing.composing(config, advantage, self.log.say)
        self._objectives: Tensor | None = None  # whose advantages [C, K] the coming update measures
        self._measured: Tensor | None = None  # what it has measured
        self._selective = False  # whether activations are partly computed again
        self.rewards: Any = None
        self.failures: Counter[str] = Counter()  # since step 0, by metric
        self._tallied: Counter[str] = Counter()  # of this process

    def run(self, command: str) -> int:
        """Everything from prompts to final/."""
        config = self.config
        prompts = load_prompts(config.data, self.tokenizer, self.sampling.max_new_tokens, config.seed)
        self.train, self.heldout = prompts.train, prompts.heldout[: self.trainer.num_samples]
        if self.composing is not None:
            seed = config.seed
            self.train = self.composing.prompts(self.train, self.tokenizer, seed)
            self.heldout = self.composing.prompts(self.heldout, self.tokenizer, seed + 1)
        self.account(prompts.audit, command)
        self.data_hash = {
            "data.train": prompts_fingerprint(prompts.train),
            "data.heldout": prompts_fingerprint(prompts.heldout),
        }
        state = self.restore_point(self.data_hash)
        if self.planned(state, len(self.train)):
            return 0
        self.check_model(p.token_ids for p in (*self.train, *self.heldout))
        policy = self._policy()
        self.engine = make_engine(config, policy, self.precision, self.world, self.trainer.value_lr_scale)
        self.model_hash = self.hash_of_start(self.engine)
        self.check_weights(state, self.model_hash)
        self._trainee(policy)
        if self.composing is not None:
            self.composing.check_parameters(self.engine.parameters)
            # the lead's word: only it is sure to read what it wrote
            self._selective = self.world.share(self._resolved()["recompute"]) == "selective"
        self._self_check()
        self.restore(self.engine, state)
        host = self._reward_host()
        self.rewards = together(self.world, lambda: components(self._reward_node(), host))
        self.transcripts = Transcripts(self.out, self.rewards.names, self.trainer.samples_every)
        steps = "steps" in self.advantage.needs
        whole = self.whole(self.engine)
        rollout = together(self.world, lambda: self.rollout(whole))
        self.experience = Experience(rollout, self.rewards, self.tokenizer, steps, self.world)
        limit = rollout.max_tokens
        longest = max(len(p.token_ids) for p in (*self.train, *self.heldout)) + self.sampling.max_new_tokens
        if limit is not None and longest > limit:
            raise ValueError(
                f"a prompt and sampling.max_new_tokens={self.sampling.max_new_tokens} can make {longest} tokens, the "
                f"engine takes {limit}: raise rollout.max_model_len or the server's --max-model-len, or lower "
                "data.max_tokens with data.overlong=drop"
            )
        self.transcripts.forget(state.step if state else 0)
        self._prove(state.step if state else 0)
        if state is None:
            self._before()
        self._fit(state)
        self._finish(command)
        return 0

    def close(self) -> None:
        """Ends the rewards' processes too."""
        try:
            super().close()
        finally:
            if self.rewards is not None:
                self.rewards.close()

    # ------------------------------------------------------------------ building

    def _policy(self) -> Policy:
        t, s = self.trainer, self.config.sampling
        longest = max(len(p.token_ids) for p in self.train) + s.max_new_tokens
        if longest > t.micro_batch_tokens:
            raise ValueError(
                f"trainer.micro_batch_tokens={t.micro_batch_tokens}: a prompt with its completion can have {longest} "
                f"tokens; use at least {longest}"
            )
        value_head = int("values" in self.advantage.needs)
        if self.composing is not None:
            value_head = self.composing.num_values
        policy, lines = self.policy(longest * t.batch_size * s.n, lambda m, layout: Policy(m, layout, value_head))
        steps = t.inner_epochs * t.inner_batches
        each = "" if steps == 1 else f", {steps} optimiser steps on each"
        lines.insert(
            1,
            f"plan {self.plan.num_steps} steps of {t.batch_size} prompts from {len(self.train)}, {s.n} completions of "
            f"each{' and a greedy one' if 'greedy' in self.advantage.needs else ''}{each}; at most "
            f"{t.micro_batch_tokens} tokens at once",
        )
        for line in lines:
            self.log.say(line)
        if s.temperature != 1 or s.top_p != 1 or s.top_k != 0:
            self.log.say(
                f"completions are drawn with temperature {s.temperature:g}, top_p {s.top_p:g}, top_k {s.top_k}, not "
                "from the policy itself, whose log-probs are those of temperature 1: a small bias"
            )
        return policy

    def _trainee(self, policy: Policy) -> None:
        config = self.config
        self.reference: Callable[..., Any] | None = None
        if "reference" in self.objective.needs or self.trainer.kl_in_reward > 0:
            anchors = Anchors(
                config,
                self.engine,
                self.pretrained,
                self.model_hash,
                [],
                self.log,
                self.signals.agree,
                lambda network: self.check_layout(network, self._branching()),
            )
            self.reference = anchors.fresh()
        cached = None
        if "reference" in self.objective.needs:
            cached = Anchor(lambda rows: [row.columns["reference_logps"] for row in rows], None)
        self.trainee = Trainee(self.engine, self.objective, policy.layout, config.trainer.micro_batch_tokens, cached)

    def _reward_node(self) -> dict[str, Any]:
        from omegaconf import OmegaConf

        node = OmegaConf.to_container(self.config.reward, resolve=True)
        assert isinstance(node, dict)
        return node  # type: ignore[return-value]

    def _reward_host(self) -> RewardHost:
        policy = self.whole(self.engine)
        return RewardHost(
            policy,
            self.tokenizer,
            policy.device,
            self.autocast,
            self.trainer.micro_batch_tokens,
            self.signals.check,
            self.log.say,
        )

    # ------------------------------------------------------------------ checks

    def _probe(self) -> list[Example]:
        """The longest prompts, as many as fit a micro-batch: a prefix cache keeps whole blocks of tokens, so that it
        may hold nothing of the others."""
        rows = sorted((p for p in self.train if len(p.token_ids) > 1), key=lambda p: -len(p.token_ids))
        rows = rows[: min(PROBE_PROMPTS, self.trainer.micro_batch_tokens // len(rows[0].token_ids))] if rows else []
        return [
            Example(
                (Row(np.array(p.token_ids, dtype=np.int32), np.arange(len(p.token_ids)) > 0),),
                p.source,
                Prompt(p.token_ids, p.text),
            )
            for p in rows
        ]

    def _branching(self) -> list[Example]:
        """Two of them, each beside one that branches off half-way: what a layout shares must be shared here too."""
        return [replace(e, rows=(e.rows[0], _branched(e.rows[0]))) for e in self._probe()[:2]]

    def _self_check(self) -> None:
        """The policy's layout must compute what the model means, and the reference must be the untrained policy."""
        probe = self._probe()
        if not probe:
            self.log.say("self-check left out: no prompt has two tokens")
            return
        gap = self.check_layout(self.engine.policy, self._branching())
        said = f"self-check passed: log-probs are the model's own to {gap:.1e} nats"
        if self.reference is not None and self.config.reference.path is None:
            ours, theirs = (self._values(network, probe)["token_logps"] for network in (self._stats, self.reference))
            ratio = max(float(np.abs(a - b).max()) for (a,), (b,) in zip(ours, theirs, strict=True))
            if not ratio <= SELF_CHECK_TOLERANCE[self.precision]:
                raise SelfCheckError(
                    f"self-check: policy and reference differ by {ratio:.2g} nats per token before training; the "
                    "reference is miswired"
                )
            said += f", policy = reference to {ratio:.1e}"
        self.log.say(said)

    def _prove(self, step: int) -> dict[str, float]:
        """What the engine gives the probe's prompts against what the trainer gives them. Raises SelfCheckError."""
        probe = self._probe()
        if not probe:
            return {}
        sequences = [e.prompt.token_ids for e in probe]
        there = together(self.world, lambda: self.experience.rollout.logps(sequences, [1] * len(probe)))
        here = self._values(self._stats, probe)["token_logps"]
        differences = np.concatenate([np.abs(np.array(a) - b) for a, (b,) in zip(there, here, strict=True)])
        largest = max(self.world.gather(float(differences.max())))
        tolerance = self.trainer.engine_tolerance or ENGINE_TOLERANCE[self.precision_name]
        if not largest <= tolerance:
            cause = (
                "the weights did not reach the engine whole, or it kept what it had computed with older ones"
                if step
                else "the engine has other weights, another precision or another attention than the trainer"
            )
            raise SelfCheckError(
                f"step {step}: the engine's log-probs differ from the trainer's by up to {largest:.2g} nats "
                f"(trainer.engine_tolerance {tolerance:g}); likely {cause}"
            )
        return {
            "rollout/engine_logp_diff_max": largest,
            "rollout/engine_logp_diff_mean": float(differences.mean()),
        }

    def _stats(self, batch: Any, needs: frozenset[str] = frozenset()) -> Any:
        return self.engine.forward(batch, needs)

    def _values(
        self, network: Callable[..., Any], parts: Sequence[Example], names: Sequence[str] = ("token_logps",)
    ) -> dict[str, list[list[np.ndarray]]]:
        self.engine.policy.eval()
        return token_values(
            network,
            parts,
            self.engine.policy.layout,
            self.trainer.micro_batch_tokens,
            self.engine.policy.device,
            names,
            self.signals.check,
            self.world,
        )

    # ------------------------------------------------------------------ a step

    def _step(self, step: int) -> dict[str, float]:
        """Draw, score, estimate, update. Signals are heeded until the first weight changes."""
        start = time.perf_counter()
        greedy = "greedy" in self.advantage.needs
        groups, drawn = self._draw(step, greedy)
        row = reward_metrics(drawn, self.rewards, self._settled)
        total = len(drawn) * (self.config.sampling.n + greedy)
        t = self.trainer
        if row["reward/missing"] > t.max_missing_fraction * total:
            raise RewardsMissing(
                f"step {step}: {row['reward/missing']} of {total} completions have no reward "
                f"(trainer.max_missing_fraction={t.max_missing_fraction:g}); failures since this start: "
                f"{', '.join(f'{n} {name}' for name, n in self._everyone(self.rewards.counts).items()) or 'none told'}"
            )
        if t.extra_draws > 0:
            row |= {"rollout/drawn_prompts": len(drawn), "rollout/kept_prompts": len(groups)}
        parts = examples(groups, t.truncated, self.engine.policy.layout, t.micro_batch_tokens)
        before = time.perf_counter()
        # it may fail, and the step is then done again: not once a composer has learnt from it
        together(self.world, self.experience.rollout.sleep)
        if self.composing is not None:
            self.composing.learning_rate = learning_rate(self.config.optimizer, step, self.plan.schedule_steps)
        parts, more = self._prepared(groups, parts)
        self.transcripts.samples(step, drawn)
        updating = time.perf_counter()
        row |= more | self._update(step, parts, len(groups))
        if self.composing is not None:
            row |= self.composing.learnt(self._measured)
        if t.kl_target is not None:
            row["kl/coefficient"] = self.kl_coefficient
            if "kl/reference" in row:  # not where nothing was said
                self.kl_coefficient = kl_coefficient(self.kl_coefficient, row["kl/reference"], t.kl_target)
        end = time.perf_counter()
        e = self.experience
        row |= {
            "time/generate_s": e.generate_seconds,
            "time/score_s": e.score_seconds,
            "time/reference_s": updating - before,
            "time/update_s": end - updating,
            "time/step_s": end - start,
        }
        e.generate_seconds = e.score_seconds = 0.0
        return row

    def _draw(self, step: int, greedy: bool) -> tuple[list[Group], list[Group]]:
        """The groups that a step learns from, and all that were drawn; with extra_draws those that cannot teach are
        replaced by further prompts', from the next pass where this one has no more."""
        # the last step of the epochs has what is left
        size = int(min(self.trainer.batch_size, self.plan.limit - (step - 1) * self.trainer.batch_size))
        kept: list[Group] = []
        drawn: list[Group] = []
        for draw in range(1 + self.trainer.extra_draws):
            prompts = self._next_prompts(size - len(kept))
            groups = self.experience.draw(prompts, self.sampling.at(step, draw), self.config.sampling.n, greedy)
            if self.trainer.extra_draws == 0:
                return groups, groups
            drawn += groups
            kept += [g for g in groups if not self._settled(g)]
            if len(kept) == size:
                break
        return kept or drawn[:size], drawn

    def _settled(self, group: Group) -> bool:
        """Whether nothing is to be learnt from a prompt's completions."""
        return group.settled if self.composing is None else self.composing.settled(group)

    def _next_prompts(self, count: int) -> list[PromptRow]:
        """The next prompts in the order of the passes; moves the position."""
        places = Plan(len(self.train), 1, 0, 0)
        first, self.position = self.position, self.position + count
        return [self.train[places.indices(k + 1, self.config.seed)[0]] for k in range(first, self.position)]

    def _prepared(self, groups: list[Group], parts: list[Example]) -> tuple[list[Example], dict[str, float]]:
        """The examples with all columns that the objective reads."""
        metrics: dict[str, float] = {}
        columns: dict[str, list[np.ndarray]] = {}
        rows = [row for e in parts for row in e.rows]
        if self.reference is not None:
            columns["reference_logps"] = _flat(self._values(self.reference, parts)["token_logps"])
        values = "values" in self.advantage.needs
        if self.old_logps == "trainer" or values:
            needs = frozenset({"values"} if values else ())
            names = ("token_logps", "values") if values else ("token_logps",)
            found = self._values(partial(self._stats, needs=needs), parts, names)
            if self.old_logps == "trainer":
                columns["old_logps"] = _flat(found["token_logps"])
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
        told = episodes(groups, rows, self.advantage.needs, penalties, _flat(found["values"]) if values else None)
        if self.composing is None:
            estimate = self.advantage(told)
        else:
            estimate, composed = self.composing.estimate(
                groups, told, lambda *asked: self._influences(parts, columns, *asked)
            )
            metrics |= composed
        return with_columns(parts, estimate, columns), metrics | estimate.metrics

    def _influences(
        self, parts: list[Example], columns: dict[str, Any], streams: Tensor, others: dict[str, Tensor], composer: Any
    ) -> influence.Influences | None:
        """What the gradients of the composer's objectives have to do with each other, before the update; None where the
        update's own passes serve for it."""
        told_afterwards = composer.apply == "next" and composer.measure == "directional"
        # shards of two gradients cannot be gathered at once; a graph of selective recompute serves for one backward
        if told_afterwards and self.single_step and not self.engine.sharded and not self._selective:
            self._objectives = streams
            return None
        prepared = with_columns(parts, Estimate(others), columns)  # a value head's loss reads returns
        c, check = composer, self.signals.check
        return influence.measure(
            self.trainee, prepared, streams, c.measure, c.max_norm, c.parameters, check, names=c.names
        )

    def _update(self, step: int, parts: list[Example], num_prompts: int) -> dict[str, float]:
        """One optimiser step for each inner batch; metrics are their means. The examples of a prompt, as many as its
        completions need, stay together: what an inner batch holds does not depend on the size of micro-batches."""
        t = self.trainer
        lr = learning_rate(self.config.optimizer, step, self.plan.schedule_steps)
        each = len(parts) // num_prompts
        beside = self._beside(parts)
        parts = parts if beside is None else beside.examples
        rows = []
        for epoch in range(t.inner_epochs):
            order = np.arange(num_prompts)
            if not self.single_step:
                order = np.random.default_rng([self.config.seed, step, epoch]).permutation(num_prompts)
            for chosen in np.array_split(order, min(t.inner_batches, num_prompts)):
                batch = [p for i in chosen for p in parts[i * each : (i + 1) * each]]
                rows.append(train_step(self.trainee, batch, lr, beside))
        self._measured = None if beside is None else beside.influences
        keys = dict.fromkeys(k for row in rows for k in row)
        return {k: float(np.mean([row[k] for row in rows if k in row])) for k in keys}

    def _beside(self, parts: list[Example]) -> influence.Directional | None:
        """What the update measures, of the objectives that _influences left to it."""
        if self._objectives is None:
            return None
        assert self.composing is not None
        objectives, self._objectives = self._objectives, None
        pattern = self.composing.composer.parameters  # type: ignore[attr-defined]
        return influence.Directional(self.trainee, parts, objectives, pattern, self.signals.check)

    # ------------------------------------------------------------------ the loop

    def _fit(self, state: checkpoint.State | None) -> None:
        step = state.step if state else 0
        self.position = state.progress["position"] if state else 0
        self.failures.update(state.progress["failures"] if state else {})
        if self.composing is not None and state is not None:
            self.composing.load_state_dict(state.progress["composer"])
        if self.trainer.kl_target is not None and state is not None:
            self.kl_coefficient = state.progress["kl_coefficient"]
        pending = state.progress["pending"] if state else None
        self.log.keep(step - 1 if pending else step)
        saved = step
        if pending:
            self._close_step(step, pending)
            self._save(step, None)
        while step < self.plan.num_steps:
            position = self.position
            try:
                self.signals.agree()
                row = self._step(step + 1)
            except (Stopped, EngineFailed, RewardsMissing) as stop:
                self.position = position  # the step is done again as a whole
                # a start that failed before its first step binds nobody to its settings
                if saved != step or (step == 0 and isinstance(stop, Stopped)):
                    self._save(step, None)
                raise
            step += 1
            self._tally()
            row["data/epoch"] = self.position / len(self.train)
            try:
                self.signals.agree()
                self._close_step(step, row)
            except (Stopped, EngineFailed):
                self._save(step, row)
                raise
            if step % self.trainer.save_every == 0 or step == self.plan.num_steps:
                self._save(step, None)
                saved = step

    def _close_step(self, step: int, row: dict[str, float]) -> None:
        """Give the new weights to the engine, prove it, evaluate if it is time, write the row."""
        start = time.perf_counter()
        whole = self.whole(self.engine)
        together(self.world, lambda: self.experience.rollout.sync(whole))
        row = row | self._prove(step)
        synced = time.perf_counter() - start
        parts = ("generate", "score", "reference", "update")
        row["time/sync_s"] = synced
        row["time/step_s"] += synced
        row["time/other_s"] = row["time/step_s"] - synced - sum(row[f"time/{part}_s"] for part in parts)
        last = step == self.plan.num_steps
        every = self.trainer.eval_every
        due = self.composing is not None and self.composing.due
        if self.heldout and (last or due or (every > 0 and step % every == 0)):
            start = time.perf_counter()
            groups = self._answers()
            row |= self._heldout_metrics(groups)
            row["time/eval_s"] = time.perf_counter() - start
            if last:
                self.transcripts.heldout("after", step, groups)
            if self.composing is not None:
                row |= self.composing.evaluated(row)
        self._tally()
        row |= self.failures
        self.log.row({"step": step} | row)
        if step % self.config.log.console_every == 0 or last:
            self.log.say(_console_line(step, self.plan, row, self.rewards.names))

    def _save(self, step: int, pending: dict[str, float] | None) -> None:
        progress = {
            "schedule_steps": self.plan.schedule_steps,
            "data": self.data_hash,
            "model": self.model_hash,
            "position": self.position,
            "failures": dict(self.failures),
            "pending": pending,
            "composer": None if self.composing is None else self.composing.state_dict(),
            "kl_coefficient": self.kl_coefficient,
        }
        self.save(self.engine, step, progress)

    def _tally(self) -> None:
        """Count what failed since the last tally. What a stop makes undone was not tallied: it is counted when it is
        done again."""
        now = Counter({f"rollout/{name}": n for name, n in self._everyone(self.experience.rollout.counts).items()})
        now.update({f"reward/failed_{name}": n for name, n in self._everyone(self.rewards.counts).items()})
        for name, n in now.items():
            self.failures[name] += n - self._tallied[name]
        self._tallied = now

    def _everyone(self, counts: Mapping[str, int]) -> Counter[str]:
        """Counts of all processes together."""
        total: Counter[str] = Counter()
        for own in self.world.gather(dict(counts)):
            total.update(own)
        return total

    # ------------------------------------------------------------------ held-out prompts

    def _answers(self) -> list[Group]:
        sampling = Sampling(
            self.trainer.sample_tokens,
            self.sampling.temperature,
            self.sampling.top_p,
            self.sampling.top_k,
            self.sampling.stop,
            self.config.seed,
        ).at(_EVALUATION)
        groups = self.experience.draw(self.heldout, sampling, self.trainer.heldout_n, greedy=True)
        self.experience.generate_seconds = self.experience.score_seconds = 0.0  # they are the evaluation's
        return groups

    def _before(self) -> None:
        """Answers of the untrained policy; a start that was killed before its first checkpoint writes them anew."""
        self.transcripts.forget_heldout("before")
        if self.heldout:
            groups = self._answers()
            self.transcripts.heldout("before", 0, groups)
            if self.composing is not None and self.composing.due:
                self.composing.evaluated(self._heldout_metrics(groups))
        self._tally()

    def _heldout_metrics(self, groups: list[Group]) -> dict[str, float]:
        lines = self.transcripts.lines(0, groups)
        return heldout_metrics(
            [line["greedy"] for line in lines],
            [line["samples"] for line in lines],
            self.rewards.names,
            self.trainer.pass_component,
        )

    # ------------------------------------------------------------------ the end

    def _finish(self, command: str) -> None:
        step = self.plan.num_steps
        last = json.loads((self.out.read("metrics.jsonl") or "").splitlines()[-1])
        # another step's when trainer.max_steps was lowered to where the run is
        if self.heldout and self.transcripts.heldout_step("after") != step:
            groups = self._answers()
            last |= self._heldout_metrics(groups)
            self.transcripts.heldout("after", step, groups)
        if self.composing is not None and self.world.lead:
            self.composing.draw(self.out.path)
        # what a component put into the policy's model is not the policy's
        self.rewards.close()
        summary: dict[str, Any] = {
            "step": step,
            "merged": self.config.merge,
            "seconds": time.perf_counter() - self.started,
            "heldout": f"{len(self.heldout)} prompts",
            "metrics": {k: v for k, v in last.items() if k.startswith(("loss/", "heldout/")) and v is not None},
            "kl": last.get("kl/reference"),
        }
        if self.heldout:
            summary["rewards"] = self.transcripts.changes()
        self.write_final(self.engine, command, summary)
        self.out.write_json("summary.json", summary)
        self.log.console.print(final_table(summary))
        self.log.say(f"model {self.out.final}, evidence {self.out.path}")


def _branched(row: Row) -> Row:
    """A row that begins as this one and goes on with its tokens in reverse."""
    half = len(row.token_ids) // 2
    return Row(np.concatenate([row.token_ids[:half], row.token_ids[half:][::-1]]), row.targets)


def _flat(parts: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [rows for part in parts for rows in part]


def _console_line(step: int, plan: Plan, row: dict[str, float], names: Sequence[str]) -> str:
    left = (plan.num_steps - step) * row["time/step_s"]
    parts = [f"step {step}/{plan.num_steps}"]
    parts += [f"{name} {row[f'reward/{name}']:.3f}" for name in names if f"reward/{name}" in row]
    short = {"kl/reference": "KL", "rollout/tokens": "tokens", "heldout/total_greedy": "held-out"}
    parts += [f"{word} {row[key]:.3g}" for key, word in short.items() if key in row]
    seconds = (f"{part} {row[f'time/{part}_s']:.1f}" for part in ("generate", "score", "update", "sync"))
    return "  ".join([*parts, f"seconds: {', '.join(seconds)}", f"{left:.0f} s left"])
