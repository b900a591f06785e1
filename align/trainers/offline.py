"""`align train` over fixed data: builds the parts, checks that they fit, runs the loop, tells what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from align import build, checkpoint
from align.config import Config
from align.data.examples import Wanted
from align.data.load import fingerprint, load
from align.device import available_bytes, memory_plan, pick_device, pick_precision, pick_recompute
from align.engine.local import LocalEngine, learning_rate
from align.evaluate.samples import paired_bootstrap
from align.log import Log
from align.models import Policy, choose_layout, enable_recompute, lora, probe_layout, weights_hash
from align.pretrained import Pretrained
from align.rundir import RunDirectory, environment
from align.trainers.anchors import Anchors
from align.trainers.answers import Answers
from align.trainers.collect import Collector
from align.trainers.final import final_table, summarise, write_final
from align.trainers.loop import NonFinite, Plan, Trainee, evaluate, plan, reference_gap, token_plan, train_step
from align.trainers.signals import Signals, Stopped

_NOUNS = {"pair": "pairs", "labelled": "labelled rows", "single": "rows"}

# Policy and reference are the same numbers at the start, computed in other batches: nats per token.
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


class SelfCheckError(RuntimeError):
    """Policy, reference and layout do not fit together; training would be on wrong numbers."""


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    objective = build.objective(config)
    if config.data.gold is not None:
        build.function(config.data.gold, "data.gold")
    run = RunDirectory(config)
    log = Log(run.path, config.log, {"recipe": config.choices.get("recipe")})
    try:
        with Signals() as signals:
            try:
                return Training(config, objective, run, log, signals).run(command)
            except Stopped as stop:
                log.say(f"{stop}; everything is saved, the same command goes on (exit code {stop.code})")
                return stop.code
            except SelfCheckError as error:
                log.say(f"stopped before the first step: {error}")
                return 1
            except checkpoint.WriteFailed as error:
                log.say(f"stopped: {error}")
                return 1
            except NonFinite as error:
                run.write_json("nonfinite.json", {"error": str(error)})
                log.say(f"stopped: {error}; the last checkpoint is intact (see docs/troubleshooting.md)")
                return 1
    finally:
        log.close()
        run.close()


class Training:
    """One process's work on a run directory, in the order it happens."""

    def __init__(self, config: Config, objective: Any, run: RunDirectory, log: Log, signals: Signals):
        self.config = config
        self.objective = objective
        self.out = run
        self.log = log
        self.signals = signals
        self.loaded: Any = None

    def run(self, command: str) -> int:
        """Everything from data to final/."""
        config, log = self.config, self.log
        started = time.perf_counter()
        pretrained = build.pretrained(config)
        self.tokenizer = pretrained.tokenizer()
        wanted = Wanted.by(self.objective)
        settings = config.data
        self.collector: Collector | None = None
        if config.collect is not None:
            self.collector = self._collector(pretrained)
            self.solved_before = self.collector.before()
            collected = self.collector.collect()
            for line in collected.lines():
                log.say(line)
            settings = replace(settings, train=str(collected.file(wanted.kind or "pair")), heldout=None)
        data = load(settings, self.tokenizer, wanted, config.seed)
        self.out.write_json("audit.json", data.audit.as_dict())
        self.out.write_json("environment.json", environment(command))
        for line in data.audit.lines():
            log.say(line)
        self.train, self.heldout = data.train, data.heldout

        saved = checkpoint.latest(self.out.checkpoints, log.say)
        state = checkpoint.load(saved) if saved is not None else None
        self.data_hash = {"data.train": fingerprint(data.train), "data.heldout": fingerprint(data.heldout)}
        for key, digest in self.data_hash.items():
            if state is not None and state.progress["data"][key] != digest:
                raise ValueError(
                    f"{key} has other rows than when {self.out.path} was started; give another run.dir or the same data"
                )
        self.plan = plan(config.trainer, len(self.train), state.progress["schedule_steps"] if state else None)
        if state is not None and state.step > self.plan.num_steps:
            raise ValueError(
                f"trainer.max_steps={config.trainer.max_steps}: {self.out.path} already has {state.step} steps; give "
                "at least as many, or another run.dir"
            )
        if state is not None and state.step == self.plan.num_steps and self._complete(state.step):
            log.say(f"{self.out.path} is complete at step {state.step}; a larger trainer.max_steps goes on")
            return 0

        policy = self._policy(pretrained)
        self.model_hash = weights_hash(policy.model)
        if state is not None and state.progress["model"] != self.model_hash:
            raise ValueError(
                f"model {pretrained.name} has other weights than when {self.out.path} was started; give another "
                "run.dir or the same weights"
            )
        trainee = self._trainee(policy, pretrained)
        self.trainee = trainee
        self._self_check()
        self.answers = Answers(
            config, self.engine, self.tokenizer, self.heldout, self.out.path, log, self.signals.check
        )
        self.answers.before()
        self._loss_before()
        torch.manual_seed(config.seed)
        if state is not None:
            trainee.engine.restore(state.model, state.optimizer)
            log.say(f"resumed {self.out.path} at step {state.step}")
        if state is not None and self.plan.num_steps > self.plan.schedule_steps:
            log.say(f"steps after {self.plan.schedule_steps} keep the schedule's last learning rate")
        self._fit(state)
        self._finish(pretrained, command, time.perf_counter() - started)
        return 0

    # ------------------------------------------------------------------ building

    def _model(self, pretrained: Pretrained) -> Any:
        """The model as it is before training; loaded once, for collecting and for training."""
        if self.loaded is None:
            self.loaded = pretrained.model().to(pick_device())
        return self.loaded

    def _pick_precision(self) -> str:
        """Sets the run's precision; returns why. What auto found at the first start holds for the whole run: a second
        measurement may come out otherwise."""
        wanted = self.config.trainer.precision
        found = (self.out.read_json("resolved.json") or {}).get("precision", wanted) if wanted == "auto" else wanted
        self.precision, why = pick_precision(found, pick_device())
        self.out.write_json(
            "resolved.json",
            (self.out.read_json("resolved.json") or {}) | {"precision": str(self.precision).removeprefix("torch.")},
        )
        return why

    def _collector(self, pretrained: Pretrained) -> Collector:
        """Asks the untrained policy now, and by rollout.sync the trained one later."""
        config, settings = self.config, self.config.collect
        assert settings is not None
        model = self._model(pretrained)
        self._pick_precision()
        device = pick_device()

        def checked(items: Any, total: int) -> Any:
            for item in self.log.progress("collect")(items, total):
                self.signals.check()
                yield item

        def silent(items: Any, total: int) -> Any:  # noqa: ARG001
            for item in items:
                self.signals.check()
                yield item

        def precision() -> torch.autocast:
            return torch.autocast(device.type, dtype=self.precision, enabled=self.precision != torch.float32)

        rollout = build.rollout(config, Policy(model, "padded"), self.tokenizer, autocast=precision, progress=silent)
        return Collector(
            settings,
            rollout,
            self.tokenizer,
            build.tool(config),
            self.out.path,
            seed=config.seed,
            max_tokens=config.data.max_tokens,
            key={"model": weights_hash(model), "precision": str(self.precision)},
            progress=checked,
        )

    def _policy(self, pretrained: Pretrained) -> Policy:
        config, log = self.config, self.log
        device = pick_device()
        model = self._model(pretrained)
        self.generation_config = model.generation_config
        resolved = self.out.read_json("resolved.json") or {}
        why = self._pick_precision()
        layout, layout_why = choose_layout(model, config.trainer.layout, config.lora.dropout)
        if config.lora.rank > 0:
            model = lora(
                model,
                rank=config.lora.rank,
                alpha=config.lora.alpha,
                dropout=config.lora.dropout,
                targets=config.lora.targets,
                seed=config.seed,
            )
        else:
            model = model.float()
        policy = Policy(model, layout)
        for module in policy.modules():  # LoRA's dropout is the only one that was asked for
            if isinstance(module, torch.nn.Dropout) and config.lora.rank == 0:
                module.p = 0.0
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        total = sum(p.numel() for p in policy.parameters())
        budget = config.trainer.micro_batch_tokens
        stream, plain = token_plan(self.train, layout, budget)
        token_plan(self.heldout, layout, budget)
        memory = memory_plan(policy.causal_lm.config, trained, min(budget, stream), self.precision)
        wanted = config.trainer.recompute
        wanted = resolved.get("recompute", wanted) if wanted == "auto" else wanted
        recompute, recompute_why = pick_recompute(wanted, memory, available_bytes(device))
        enable_recompute(policy, recompute)
        precision = str(self.precision).removeprefix("torch.")
        self.out.write_json("resolved.json", {"precision": precision, "recompute": recompute, "layout": layout})
        p, noun = self.plan, _NOUNS[Wanted.by(self.objective).kind]
        log.say(f"model {pretrained.name}: {total / 1e6:.1f}M weights, {trained / 1e6:.2f}M trained, on {device.type}")
        log.say(
            f"plan {p.num_steps} steps of {p.batch_size} {noun} from {p.num_examples}, "
            f"schedule over {p.schedule_steps}; at most {budget} tokens at once"
        )
        log.say(f"layout {layout} ({layout_why}): {stream} tokens a pass for {plain} real ones")
        log.say(f"precision {precision} ({why}); recompute {recompute} ({recompute_why})")
        return policy

    def _trainee(self, policy: Policy, pretrained: Pretrained) -> Trainee:
        config = self.config
        self.engine = engine = LocalEngine(policy, config.optimizer, self.precision)
        # A run of few steps over many rows pays for the rows it will see; the first two are the self-check's.
        visited = {0, min(1, len(self.train) - 1)}
        for step in range(1, self.plan.num_steps + 1):
            visited |= set(self.plan.indices(step, config.seed))
            if len(visited) == len(self.train):
                break
        self.anchors = Anchors(
            config,
            engine,
            pretrained,
            self.model_hash,
            [self.train[i] for i in sorted(visited)] + self.heldout,
            self.log,
            self.signals.check,
        )
        reference, start = self.anchors.of(self.objective)
        return Trainee(engine, self.objective, policy.layout, config.trainer.micro_batch_tokens, reference, start)

    # ------------------------------------------------------------------ checks before the first step

    def _self_check(self) -> None:
        """The policy must be its own reference before training, and its layout the model's own attention."""
        trainee = self.trainee
        first = self.train[:2]
        with self.engine.autocast():
            gap = probe_layout(self.engine.policy, first)
        limit = SELF_CHECK_TOLERANCE[self.precision]
        if gap > limit:
            raise SelfCheckError(
                f"self-check: {self.engine.policy.layout} log-probs differ from the model's own attention by "
                f"{gap:.2g} nats per token; use trainer.layout=padded and report the model"
            )
        if trainee.reference is None or self.anchors.foreign is not None:
            self.log.say(f"self-check passed: layouts agree to {gap:.1e} nats")
            return
        ratio = reference_gap(trainee, first)
        if not ratio <= limit:
            raise SelfCheckError(
                f"self-check: policy and reference differ by {ratio:.2g} nats per token before training; "
                "the reference is miswired (stale cache? remove reference.cache_dir, or use reference.mode=model)"
            )
        self.log.say(
            f"self-check passed: policy = reference to {ratio:.1e} nats per token, layouts agree to {gap:.1e} nats"
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
            self._or_save(step, row, self.signals.check)
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
        self.log.flush()
        progress = {
            "schedule_steps": self.plan.schedule_steps,
            "data": self.data_hash,
            "model": self.model_hash,
            "pending": pending,
        }
        state = checkpoint.State(step, self.engine.model_state(), self.engine.optimizer_state(), progress)
        checkpoint.save(self.out.checkpoints, state, self.config.trainer.keep_checkpoints)

    # ------------------------------------------------------------------ the end

    def _solved(self) -> dict[str, Any]:
        """How many of the held-out problems the policy solved before and solves now."""
        assert self.collector is not None
        self.collector.loop.rollout.sync(self.engine.policy)
        return _solved_summary(self.solved_before, self.collector.after())

    def _complete(self, step: int) -> bool:
        summary = self.out.read_json("summary.json")
        if summary is None or summary["step"] != step or summary["merged"] != self.config.merge:
            return False
        return not checkpoint.problem(self.out.final)

    def _finish(self, pretrained: Pretrained, command: str, seconds: float) -> None:
        step = self.plan.num_steps
        samples = self.answers.after(step)
        kl = self.answers.kl(self.anchors.network(self.trainee.reference)) if samples else None
        last = json.loads((self.out.path / "metrics.jsonl").read_text().splitlines()[-1])
        summary = {
            "step": step,
            "merged": self.config.merge,
            "seconds": seconds,
            "heldout": f"{len(self.heldout)} {_NOUNS[Wanted.by(self.objective).kind]}",
        }
        summary |= summarise(last, samples, kl)
        before = self.out.read_json("before.json")
        if before is not None:
            summary["before"] = before
        if self.collector is not None:
            summary["problems"] = self._solved()
        write_final(
            self.out.final,
            self.engine.policy,
            self.tokenizer,
            self.generation_config,
            self.config,
            pretrained.name,
            command,
            summary,
        )
        self.out.write_json("summary.json", summary)
        self.log.console.print(final_table(summary))
        self.log.say(f"model {self.out.final}, evidence {self.out.path}")


def _solved_summary(before: list[float], after: list[float]) -> dict[str, Any]:
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
