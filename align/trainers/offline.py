"""`align train` over fixed data: builds the parts, checks that they fit, runs the loop, tells what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from align import build, checkpoint
from align.config import Config
from align.data.examples import Wanted
from align.data.load import fingerprint, load
from align.engine.build import make_engine
from align.engine.local import learning_rate
from align.engine.world import together
from align.evaluate.samples import paired_bootstrap
from align.models import Network, Policy, Scorer, base_model, choose_layout, weights_hash
from align.pretrained import Pretrained
from align.rewards import network
from align.trainers.anchors import Anchors
from align.trainers.answers import Answers
from align.trainers.collect import Collector
from align.trainers.final import final_table, summarise
from align.trainers.loop import Plan, Trainee, evaluate, reference_gap, score_rows, token_plan, train_step
from align.trainers.run import SELF_CHECK_TOLERANCE, Run, SelfCheckError, start
from align.trainers.signals import Stopped
from align.types import Layout

_NOUNS = {"pair": "pairs", "labelled": "labelled rows", "single": "rows", "ranked": "ranked lists"}


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    objective = build.objective(config)
    return start(config, command, objective, Training)


class Training(Run):
    """Training over fixed data, in the order it happens."""

    foreign: Pretrained | None = None  # a reference that reference.path cannot name

    @property
    def scores(self) -> bool:
        """Whether it is a reward model that is trained."""
        return "scores" in self.objective.needs

    def given(self, model: Any, foreign: Pretrained | None) -> None:
        """Train this model, which is what the settings name, loaded already; foreign: with another one as reference."""
        self._loaded, self.generation_config = model, model.generation_config
        self.foreign = foreign

    def run(self, command: str) -> int:
        """Everything from data to final/."""
        config, log = self.config, self.log
        wanted = Wanted.by(self.objective)
        settings = config.data
        self.collector: Collector | None = None
        if config.collect is not None:
            self.collector = self._collector()
            self.solved_before = self.collector.before()
            collected = self.collector.collect()
            for line in collected.lines():
                log.say(line)
            settings = replace(settings, train=str(collected.file(wanted.kind or "pair")), heldout=None)
        data = load(settings, self.tokenizer, wanted, config.seed)
        self.account(data.audit, command)
        self.train, self.heldout = data.train, data.heldout
        self.prompts = {row.chat for row in data.train_rows}

        self.data_hash = {"data.train": fingerprint(data.train), "data.heldout": fingerprint(data.heldout)}
        state = self.restore_point(self.data_hash)
        if self.planned(state, len(self.train)):
            return 0

        self.check_model(row.token_ids for e in (*self.train, *self.heldout) for row in e.rows)
        policy = self._policy()
        self.engine = make_engine(config, policy, self.precision, self.world)
        self.model_hash = self.hash_of_start(self.engine)
        self.check_weights(state, self.model_hash)
        self.trainee = self._trainee(policy.layout)
        self._self_check()
        self.answers = Answers(self, self.engine, self.heldout)
        self.answers.before()
        self._loss_before()
        self.restore(self.engine, state)
        self._fit(state)
        self._finish(command)
        return 0

    # ------------------------------------------------------------------ building

    def _collector(self) -> Collector:
        """Asks the untrained policy now, and by rollout.sync the trained one later."""
        settings = self.config.collect
        assert settings is not None
        model = self.model()
        self.check_model([])
        self.pick_precision()
        return Collector(
            settings,
            self.rollout(Policy(model, "padded")),
            self.tokenizer,
            build.tool(self.config),
            self.out.path,
            seed=self.config.seed,
            max_tokens=self.config.data.max_tokens,
            key={"model": weights_hash(model), "precision": str(self.precision)},
            bound=bool(checkpoint.steps(self.out.checkpoints)),
            progress=self.shown("collect"),
        )

    def _policy(self) -> Any:
        model, config = self.model(), self.config
        layout, _ = choose_layout(model, config.trainer.layout, config.lora.dropout)
        budget = config.trainer.micro_batch_tokens
        stream, plain = token_plan(self.train, layout, budget)
        token_plan(self.heldout, layout, budget)
        policy, lines = self.policy(stream, self._trained)
        p, noun = self.plan, _NOUNS[Wanted.by(self.objective).kind]
        lines.insert(
            1,
            f"plan {p.num_steps} steps of {p.batch_size} {noun} from {p.num_examples}, "
            f"schedule over {p.schedule_steps}; at most {budget} tokens at once",
        )
        lines[2] += f": {stream} tokens a pass for {plain} real ones"
        for line in lines:
            self.log.say(line)
        return policy

    def _trained(self, model: Any, layout: Layout) -> Network:
        """What the objective trains: a policy, or a reward model."""
        if not self.scores:
            return Policy(model, layout, "values" in self.objective.needs)
        causal_lm = base_model(model)
        network.check_classes(causal_lm.config, self.pretrained.name)
        if self.config.head.only:
            model.requires_grad_(False)
        width = causal_lm.config.get_text_config().hidden_size
        return Scorer(model, layout, network.new_head(self.objective, width, self.config.head, self.config.seed))

    def _trainee(self, layout: Layout) -> Trainee:
        config = self.config
        # A run of few steps over many rows pays for the rows it will see; the first two are the self-check's.
        visited = {0, min(1, len(self.train) - 1)}
        for step in range(1, self.plan.num_steps + 1):
            visited |= set(self.plan.indices(step, config.seed))
            if len(visited) == len(self.train):
                break
        self.anchors = Anchors(
            config,
            self.engine,
            self.pretrained,
            self.model_hash,
            [self.train[i] for i in sorted(visited)] + self.heldout,
            self.log,
            self.signals.agree,
            lambda network: self.check_layout(network, self.train[:2]),
        )
        if self.foreign is not None:
            self.anchors.foreign = self.foreign
        reference, start = self.anchors.of(self.objective)
        return Trainee(self.engine, self.objective, layout, config.trainer.micro_batch_tokens, reference, start)

    # ------------------------------------------------------------------ checks before the first step

    def _self_check(self) -> None:
        """The policy must be its own reference before training, and its layout the model's own attention."""
        trainee = self.trainee
        first = self.train[:2]
        gap = self.check_layout(self.engine.policy, first)
        if trainee.reference is None or self.anchors.foreign is not None:
            self.log.say(f"self-check passed: log-probs are the model's own to {gap:.1e} nats")
            return
        ratio = reference_gap(trainee, first)
        if not ratio <= SELF_CHECK_TOLERANCE[self.precision]:
            raise SelfCheckError(
                f"self-check: policy and reference differ by {ratio:.2g} nats per token before training; "
                "the reference is miswired (stale cache? remove reference.cache_dir, or use reference.mode=model)"
            )
        self.log.say(
            f"self-check passed: log-probs are the model's own to {gap:.1e} nats, policy = reference to {ratio:.1e}"
        )

    def _loss_before(self) -> None:
        """Where the loss before training is not known beforehand, as it is (ln 2) with policy = reference."""
        if self.heldout and self.trainee.reference is None and self.out.read_json("before.json") is None:
            metrics = evaluate(self.trainee, self.heldout, self.signals.check)
            self.out.write_json("before.json", {"loss/heldout": metrics["loss/heldout"]})

    # ------------------------------------------------------------------ the loop

    def _fit(self, state: checkpoint.State | None) -> None:
        config, trainee = self.config.trainer, self.trainee
        step = state.step if state else 0
        pending = state.progress["pending"] if state else None
        self.log.keep(step - 1 if pending else step)
        saved = step
        if pending:
            self._row(step, pending)
            self._save(step, None)
        while step < self.plan.num_steps:
            start = time.perf_counter()
            indices = self.plan.indices(step + 1, self.config.seed)
            lr = learning_rate(self.config.optimizer, step + 1, self.plan.schedule_steps)
            row = train_step(trainee, [self.train[i] for i in indices], lr)
            step += 1
            row["data/epoch"] = min(step * config.batch_size, self.plan.limit) / self.plan.num_examples
            row["time/step_s"] = time.perf_counter() - start
            self._or_save(step, row, self.signals.agree)
            self._or_save(step, row, lambda step=step, row=row: self._row(step, row))
            if step % config.save_every == 0 or step == self.plan.num_steps:
                self._save(step, None)
                saved = step
        if saved != step:
            self._save(step, None)

    def _or_save(self, step: int, row: dict[str, float], work: Callable[[], None]) -> None:
        """Do `work`; if a signal interrupts it, save first. The step is done, its row is not written yet."""
        try:
            work()
        except Stopped:
            self._save(step, row)
            raise

    def _row(self, step: int, row: dict[str, float]) -> None:
        every = self.config.trainer.eval_every
        due = step == self.plan.num_steps or (every > 0 and step % every == 0)
        if due and self.heldout:
            start = time.perf_counter()
            row = row | evaluate(self.trainee, self.heldout, self.signals.check)
            row["time/eval_s"] = time.perf_counter() - start
        self.log.row({"step": step} | row)
        if step % self.config.log.console_every == 0 or step == self.plan.num_steps:
            self.log.say(_console_line(step, self.plan, row))

    def _save(self, step: int, pending: dict[str, float] | None) -> None:
        progress = {
            "schedule_steps": self.plan.schedule_steps,
            "data": self.data_hash,
            "model": self.model_hash,
            "pending": pending,
        }
        self.save(self.engine, step, progress)

    # ------------------------------------------------------------------ the end

    def _solved(self) -> dict[str, Any]:
        """How many of the held-out problems the policy solved before and solves now."""
        assert self.collector is not None
        return solved_summary(self.solved_before, self.collector.after())

    def _finish(self, command: str) -> None:
        step = self.plan.num_steps
        self.signals.agree_again()
        if self.answers.prompts or self.collector is not None:
            whole = self.whole(self.engine)
            rollout = self.rollout(whole)
            together(self.world, lambda: rollout.sync(whole))
            if self.collector is not None:
                self.collector.loop.rollout = rollout
        samples = self.answers.after(step)
        kl = self.answers.kl(self.anchors.network(self.trainee.reference)) if samples else None
        last = json.loads((self.out.read("metrics.jsonl") or "").splitlines()[-1])
        summary = {
            "step": step,
            "merged": self.config.merge,
            "seconds": time.perf_counter() - self.started,
            "heldout": f"{len(self.heldout)} {_NOUNS[Wanted.by(self.objective).kind]}",
        }
        summary |= summarise(last, samples, kl)
        before = self.out.read_json("before.json")
        if before is not None:
            summary["before"] = before
        if self.collector is not None:
            summary["problems"] = self._solved()
        self.write_final(self.engine, command, summary, self._saved_form() if self.scores else None)
        self.out.write_json("summary.json", summary)
        table = final_table(summary)
        if table.row_count:  # nothing held out, nothing to tell
            self.log.console.print(table)
        self.log.say(f"model {self.out.final}, evidence {self.out.path}")

    def _saved_form(self) -> dict[str, Any]:
        """What reward_model.json says. Mean and deviation are of raw scores of held-out answers, for information."""
        objective = self.objective
        form = {"kind": objective.reward_kind, "outputs": list(objective.outputs), "ends": "end_of_turn"}
        # how a prompt that comes as a text is to be written when it is scored
        form["prompts"] = "both" if len(self.prompts) > 1 else "chat" if True in self.prompts else "text"
        form |= objective.metadata()
        scores = score_rows(self.trainee, self.heldout, self.signals.check)
        if scores is not None and len(scores) > 1:
            form |= {"mean": scores.mean(0).tolist(), "std": scores.std(0, ddof=1).tolist(), "count": len(scores)}
        return form


def solved_summary(before: list[float], after: list[float]) -> dict[str, Any]:
    """Shares of held-out problems solved before and after, and their difference with its interval."""
    change = paired_bootstrap(before, after)
    return {
        "count": len(before),
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "change": {"mean": change.mean, "low": change.low, "high": change.high},
    }


def _console_line(step: int, plan: Plan, row: dict[str, float]) -> str:
    left = (plan.num_steps - step) * row["time/step_s"]
    parts = [f"step {step}/{plan.num_steps}", f"loss {row['loss/total']:.4f}"]
    names = {
        "accuracy/train": "accuracy",
        "reward/margin": "margin",
        "wpo/weight": "weight",
        "accuracy/heldout": "held-out",
    }
    parts += [f"{short} {row[key]:.3f}" for key, short in names.items() if key in row]
    parts += [f"{row['tokens/real'] / row['time/step_s']:.0f} tokens/s", f"{left:.0f} s left"]
    return "  ".join(parts)
