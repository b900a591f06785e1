"""What every trainer does around its loop: the run directory, the model, precision, memory, the rollout, stopping.

A trainer is a Run with a loop of its own; `start` opens the directory and turns what can go wrong into exit codes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from align import build, checkpoint
from align.config import Config
from align.data.audit import Audit
from align.device import available_bytes, memory_plan, pick_device, pick_precision, pick_recompute
from align.engine.local import LocalEngine
from align.log import Log
from align.models import Network, Policy, choose_layout, enable_recompute, is_peft, lora, probe_layout
from align.pretrained import Pretrained
from align.rollout.base import EngineFailed, Host, Rollout
from align.rundir import RunDirectory, environment
from align.trainers.loop import NonFinite, plan
from align.trainers.signals import Signals, Stopped
from align.types import Example

# The same numbers computed in other batches or by other kernels: nats per token.
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


class SelfCheckError(RuntimeError):
    """Policy, reference, layout or engine do not fit together; training would be on wrong numbers."""


class Run:
    """One process's work on a run directory: what trainers share."""

    def __init__(self, config: Config, objective: Any, out: RunDirectory, log: Log, signals: Signals):
        self.config = config
        self.objective = objective
        self.out = out
        self.log = log
        self.signals = signals
        self.started = time.perf_counter()
        self.pretrained: Pretrained = build.pretrained(config)
        self.tokenizer = self.pretrained.tokenizer()
        self._loaded: Any = None
        self._rollout: Rollout | None = None
        self._label = ""
        self._adapted = False

    def run(self, command: str) -> int:
        """Everything; returns the exit code."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was started: also after an error."""
        if self._rollout is not None:
            self._rollout.close()

    # ------------------------------------------------------------------ the model

    def model(self) -> Any:
        """The model as it is before training; loaded once."""
        if self._loaded is None:
            self._loaded = self.pretrained.model().to(pick_device())
            self.generation_config = self._loaded.generation_config
        return self._loaded

    def pick_precision(self) -> str:
        """Sets the run's precision; returns why. What auto found at the first start holds for the whole run: a second
        measurement may come out otherwise."""
        wanted = self.config.trainer.precision
        found = self._resolved().get("precision", wanted) if wanted == "auto" else wanted
        self.precision, why = pick_precision(found, pick_device())
        self._resolve(precision=self.precision_name)
        return why

    @property
    def precision_name(self) -> str:
        """float32 or bfloat16."""
        return str(self.precision).removeprefix("torch.")

    def policy(self, stream_tokens: int, make: Callable[[Any, Any], Network] = Policy) -> tuple[Any, list[str]]:
        """The policy to be trained, with its adapters, in the layout and with the recompute that fit; and lines that
        say so. stream_tokens: of the largest step's pass. make: the Policy of a model in a layout."""
        config = self.config
        model = self.model()
        resolved = self._resolved()
        why = self.pick_precision()
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
        policy = make(model, layout)
        for name, module in policy.named_modules():  # LoRA's and the head's are the only ones that were asked for
            asked = ".lora_dropout." in name or name.startswith("head.")
            if isinstance(module, torch.nn.Dropout) and not asked:
                module.p = 0.0
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        total = sum(p.numel() for p in policy.parameters())
        tokens = min(config.trainer.micro_batch_tokens, stream_tokens)
        memory = memory_plan(policy.causal_lm.config, trained, tokens, self.precision)
        wanted = config.trainer.recompute
        wanted = resolved.get("recompute", wanted) if wanted == "auto" else wanted
        device = pick_device()
        recompute, recompute_why = pick_recompute(wanted, memory, available_bytes(device))
        enable_recompute(policy, recompute)
        self._resolve(recompute=recompute, layout=layout)
        return policy, [
            f"model {self.pretrained.name}: {total / 1e6:.1f}M weights, {trained / 1e6:.2f}M trained, on {device.type}",
            f"layout {layout} ({layout_why})",
            f"precision {self.precision_name} ({why}); recompute {recompute} ({recompute_why})",
        ]

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the run's precision."""
        device = pick_device().type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    def check_layout(self, policy: Network, examples: list[Example]) -> float:
        """Largest difference of the layout's log-probs from the model's own attention. Raises SelfCheckError."""
        with self.autocast():
            gap = probe_layout(policy, examples)
        if gap > SELF_CHECK_TOLERANCE[self.precision]:
            raise SelfCheckError(
                f"self-check: {policy.layout} log-probs differ from the model's own attention by "
                f"{gap:.2g} nats per token; use trainer.layout=padded and report the model"
            )
        return gap

    # ------------------------------------------------------------------ the rollout

    def rollout(self, policy: Policy) -> Rollout:
        """The backend of the group rollout, which `policy` is given to when it is made; another one if the policy has
        got adapters since."""
        if self._rollout is not None and self._adapted != is_peft(policy.model):
            self._rollout.close()
            self._rollout = None
        if self._rollout is None:
            self._adapted = is_peft(policy.model)
            host = Host(
                policy,
                self.tokenizer,
                self.out.path / "rollout",
                self.precision_name,
                self.autocast,
                self.signals.check,
                self._progress,
                self.log.say,
            )
            self._rollout = build.rollout(self.config, host)
        return self._rollout

    @contextlib.contextmanager
    def showing(self, what: str) -> Iterator[None]:
        """Inside, the rollout's progress is seen under this name."""
        before, self._label = self._label, what
        try:
            yield
        finally:
            self._label = before

    def _progress(self, items: Iterable[int], total: int) -> Iterable[int]:
        return self.log.progress(self._label)(items, total) if self._label else items

    def shown(self, what: str) -> Callable[[Iterable[int], int], Iterable[int]]:
        """A progress of its own that is seen, and looks for signals."""

        def wrap(items: Iterable[int], total: int) -> Iterator[int]:
            for item in self.log.progress(what)(items, total):
                self.signals.check()
                yield item

        return wrap

    # ------------------------------------------------------------------ the directory

    def restore_point(self, data: dict[str, str]) -> checkpoint.State | None:
        """The newest whole checkpoint, if there is one. data: fingerprints by setting.

        Raises ValueError if it was made with other data.
        """
        saved = checkpoint.latest(self.out.checkpoints, self.log.say)
        state = checkpoint.load(saved) if saved is not None else None
        for key, digest in data.items():
            if state is not None and state.progress["data"][key] != digest:
                raise ValueError(
                    f"{key} has other rows than when {self.out.path} was started; give another run.dir or the same data"
                )
        return state

    def account(self, audit: Audit, command: str) -> None:
        """What the run reads and where it runs, for people and on disk."""
        self.out.write_json("audit.json", audit.as_dict())
        self.out.write_json("environment.json", environment(command))
        for line in audit.lines():
            self.log.say(line)

    def planned(self, state: checkpoint.State | None, num_examples: int) -> bool:
        """Sets the plan; returns whether nothing is left to do. Raises ValueError for fewer steps than are done."""
        trainer = self.config.trainer
        self.plan = plan(trainer, num_examples, state.progress["schedule_steps"] if state else None)
        if state is not None and state.step > self.plan.num_steps:
            raise ValueError(
                f"trainer.max_steps={trainer.max_steps}: {self.out.path} already has {state.step} steps; give at least "
                "as many, or another run.dir"
            )
        done = state is not None and state.step == self.plan.num_steps and self.complete(state.step)
        if done:
            self.log.say(f"{self.out.path} is complete at step {state.step}; a larger trainer.max_steps goes on")
        return done

    def restore(self, engine: LocalEngine, state: checkpoint.State | None) -> None:
        """The engine as it was at the checkpoint, and torch's generator; at the start, the generator seeded."""
        torch.manual_seed(self.config.seed)
        if state is None:
            return
        engine.restore(state.model, state.optimizer)
        self.log.say(f"resumed {self.out.path} at step {state.step}")
        if self.plan.num_steps > self.plan.schedule_steps:
            self.log.say(f"steps after {self.plan.schedule_steps} keep the schedule's last learning rate")

    def check_weights(self, state: checkpoint.State | None, model_hash: str) -> None:
        """Raises ValueError if the run was started from other weights."""
        if state is not None and state.progress["model"] != model_hash:
            raise ValueError(
                f"model {self.pretrained.name} has other weights than when {self.out.path} was started; give another "
                "run.dir or the same weights"
            )

    def complete(self, step: int) -> bool:
        """Whether final/ and summary.json of this step are there and whole."""
        summary = self.out.read_json("summary.json")
        if summary is None or summary["step"] != step or summary["merged"] != self.config.merge:
            return False
        return not checkpoint.problem(self.out.final)

    def _resolved(self) -> dict[str, Any]:
        return self.out.read_json("resolved.json") or {}

    def _resolve(self, **found: str) -> None:
        self.out.write_json("resolved.json", self._resolved() | found)


def start(config: Config, command: str, objective: Any, make: Callable[..., Run]) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    head = config.head
    if "scores" not in objective.needs and (head.path is not None or head.only or head.dropout):
        raise ValueError(
            f"head has no effect: objective={config.choices['objective']} trains no reward model; leave it"
        )
    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    if not torch.cuda.is_available():  # DeepSpeed, which PEFT imports, warns of what everyone here knows
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    out = RunDirectory(config)
    log = Log(out.path, config.log, {"recipe": config.choices.get("recipe")})
    try:
        with Signals() as signals:
            run = None
            try:
                run = make(config, objective, out, log, signals)
                return run.run(command)
            except Stopped as stop:
                log.say(f"{stop}; everything is saved, the same command goes on (exit code {stop.code})")
                return stop.code
            except SelfCheckError as error:
                log.say(f"stopped: {error}")
                return 1
            except (checkpoint.WriteFailed, EngineFailed) as error:
                log.say(f"stopped: {error}")
                return 1
            except NonFinite as error:
                out.write_json("nonfinite.json", {"error": str(error)})
                log.say(f"stopped: {error}; the last checkpoint is intact (see docs/troubleshooting.md)")
                return 1
            finally:
                if run is not None:
                    run.close()
    finally:
        log.close()
        out.close()
