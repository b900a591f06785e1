"""What every trainer does around its loop: the run directory, the model, precision, memory, the rollout, stopping.

A trainer is a Run with a loop of its own; `start` opens the directory and turns what can go wrong into exit codes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from align import build, checkpoint
from align.config import Config
from align.data.audit import Audit
from align.data.chat import stop_ids
from align.device import available_bytes, memory_plan, pick_device, pick_precision, pick_recompute
from align.engine.base import Engine, shape_of
from align.engine.loading import load_model
from align.engine.world import World, by_lead, join, leave, together
from align.log import Log
from align.models import (
    Apart,
    Network,
    Policy,
    choose_layout,
    enable_recompute,
    is_peft,
    lora,
    probe_layout,
    weights_hash,
)
from align.pretrained import Pretrained
from align.rollout.base import EngineFailed, Host, Rollout, seed_of
from align.rundir import RunDirectory, environment
from align.trainers.drawing import Led
from align.trainers.final import write_final
from align.trainers.loop import NonFinite, plan
from align.trainers.signals import Signals, Stopped
from align.types import Example, Layout
from align.weights import check_tokens

# The same numbers computed in other batches or by other kernels: nats per token.
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


class SelfCheckError(RuntimeError):
    """Policy, reference, layout or engine do not fit together; training would be on wrong numbers."""


class Run(ABC):
    """One process's work on a run directory: what trainers share."""

    def __init__(self, config: Config, objective: Any, out: RunDirectory, log: Log, signals: Signals):
        self.config = config
        self.objective = objective
        self.out = out
        self.world = out.world
        self.log = log
        self.signals = signals
        self.started = time.perf_counter()
        self.pretrained: Pretrained = build.pretrained(config)
        self.tokenizer = self.pretrained.tokenizer()
        self._loaded: Any = None
        self._rollout: Rollout | None = None
        self._whole: Network | None = None
        self._label = ""
        self._adapted = False

    @abstractmethod
    def run(self, command: str) -> int:
        """Everything; returns the exit code."""

    def close(self) -> None:
        """End what was started: also after an error."""
        rollout, self._rollout = self._rollout, None
        if rollout is not None:
            rollout.close()

    # ------------------------------------------------------------------ the model

    def model(self) -> Any:
        """The model as it is before training; loaded once."""
        if self._loaded is None:
            whole = self.config.lora.rank == 0 and not self.config.head.only
            c = self.config
            self._loaded = load_model(self.pretrained, c.engine, c.optimizer, self.world, whole, self.log.say)
            self.generation_config = self._loaded.generation_config
        return self._loaded

    def pick_precision(self) -> str:
        """Sets the run's precision; returns why. What auto found at the first start holds for the whole run: a second
        measurement may come out otherwise."""
        wanted = self.config.trainer.precision
        found = self._resolved().get("precision", wanted) if wanted == "auto" else wanted
        self.precision, why = self.world.share(pick_precision(found, pick_device()))
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
        self._shape = (make, layout)
        policy = self._network(model)
        trained = sum(math.prod(shape_of(p)) for p in policy.parameters() if p.requires_grad)
        total = sum(math.prod(shape_of(p)) for p in policy.parameters())
        tokens = min(config.trainer.micro_batch_tokens, stream_tokens)
        held = round(trained * _held(config.engine.stage, self.world.size))
        memory = memory_plan(policy.causal_lm.config, held, tokens, self.precision)
        wanted = config.trainer.recompute
        wanted = resolved.get("recompute", wanted) if wanted == "auto" else wanted
        device = pick_device()
        # on one node processes on the host share its memory
        free = available_bytes(device) // (self.world.size if device.type == "cpu" else 1)
        recompute, recompute_why = self.world.share(pick_recompute(wanted, memory, free))
        enable_recompute(policy, recompute)
        self._resolve(recompute=recompute, layout=layout)
        return policy, [
            f"model {self.pretrained.name}: {total / 1e6:.1f}M weights, {trained / 1e6:.2f}M trained, on {device.type}",
            f"layout {layout} ({layout_why})",
            f"precision {self.precision_name} ({why}); recompute {recompute} ({recompute_why})",
        ]

    def _network(self, model: Any) -> Network:
        """What is trained of a model: with its adapters and heads, without dropout that nobody asked for."""
        settings = self.config.lora
        make, layout = self._shape
        if settings.rank > 0:
            model = lora(
                model,
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                targets=settings.targets,
                seed=self.config.seed,
            )
        else:
            model = model.float()
        network = make(model, layout)
        for name, module in network.named_modules():  # LoRA's and the head's are the only ones that were asked for
            asked = ".lora_dropout." in name or name.startswith("head.")
            if isinstance(module, torch.nn.Dropout) and not asked:
                module.p = 0.0
        return network

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the run's precision."""
        device = pick_device().type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    def check_layout(self, policy: Network, examples: list[Example]) -> float:
        """Largest difference of what is trained from the model's own forward. Raises SelfCheckError."""
        if not examples:
            return 0.0
        apart, tolerance = self._apart(policy, examples, policy.layout), SELF_CHECK_TOLERANCE[self.precision]
        if apart.beyond_rounding <= tolerance:
            return apart.largest
        packed = policy.layout != "padded"
        if packed and self._apart(policy, examples, "padded").beyond_rounding <= tolerance:
            cure = "use trainer.layout=padded"
        else:
            cure = "its head or attention is not known to align"
        raise SelfCheckError(
            f"self-check: log-probs in layout {policy.layout} differ by {apart.largest:.2g} nats per token from those "
            f"of {type(policy.causal_lm).__name__}'s own forward; {cure}, report the model"
        )

    def _apart(self, policy: Network, examples: list[Example], layout: Layout) -> Apart:
        """Of all processes the one that is furthest off."""
        with self.autocast():
            return max(self.world.gather(probe_layout(policy, examples, layout)), key=lambda a: a.beyond_rounding)

    def check_model(self, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Raises ValueError if the model cannot read these rows of token ids, or end a turn."""
        size = shape_of(self.model().get_input_embeddings().weight)[0]
        ends = stop_ids(self.tokenizer, self.generation_config)
        check_tokens(f"model {self.pretrained.name}", self.tokenizer, size, itertools.chain(rows, [ends]))

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
                self.out.path / ("rollout" if self.world.size == 1 else f"rollout-{self.world.rank}"),
                self.precision_name,
                self.autocast,
                self.signals.check,
                self._progress,
                self.log.say,
            )
            if self.world.size > 1 and build.serves_all(self.config):
                one = by_lead(self.world, lambda: build.rollout(self.config, host))
                self._rollout = Led(one, self.world)
            else:
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

    def whole(self, engine: Engine) -> Any:
        """The policy with all its weights in this process, as they are now: the engine's own, or a copy on the device
        where that one is sharded. All processes must ask."""
        if not engine.sharded:
            return engine.policy
        if self._whole is None:
            self._whole = together(self.world, lambda: self._copy(pick_device()))
        _fill(self._whole, engine)
        return self._whole

    def _copy(self, device: torch.device) -> Network:
        return self._network(self.pretrained.model().to(device)).eval().requires_grad_(False)

    def write_final(
        self, engine: Engine, command: str, summary: dict[str, Any], form: dict[str, Any] | None = None
    ) -> None:
        """final/, by the lead; see align.trainers.final."""
        whole = engine.policy
        if engine.sharded:  # in the lead's memory alone
            whole = by_lead(self.world, lambda: self._copy(torch.device("cpu")))
            _fill(whole, engine)

        def write() -> None:
            write_final(
                self.out.final,
                whole,
                self.tokenizer,
                self.generation_config,
                self.config,
                self.pretrained.name,
                command,
                summary,
                form,
            )

        by_lead(self.world, write)

    # ------------------------------------------------------------------ the directory

    def restore_point(self, data: dict[str, str]) -> checkpoint.State | None:
        """The newest whole checkpoint, if there is one. data: fingerprints by setting.

        Raises ValueError if it was made with other data.
        """
        self._check_same(data)
        saved = checkpoint.latest(self.out.checkpoints, self.log.say, self.world)
        state = checkpoint.load(saved) if saved is not None else None
        for key, digest in data.items():
            if state is not None and state.progress["data"][key] != digest:
                raise ValueError(
                    f"{key} has other rows than when {self.out.path} was started; give another run.dir or the same data"
                )
        return state

    def _check_same(self, data: dict[str, str]) -> None:
        """Raises ValueError if the processes of the run do not read the same rows."""
        for rank, other in enumerate(self.world.gather(data)):
            odd = [key for key in data if other[key] != data[key]]
            if odd:
                raise ValueError(
                    f"{odd[0]} has other rows in process {rank} than in process {self.world.rank}; all nodes must see "
                    "the same files"
                )

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

    def save(self, engine: Engine, step: int, progress: dict[str, Any]) -> None:
        """A checkpoint of the engine and of what the loop says of itself."""
        self.log.flush()
        keep = self.config.trainer.keep_checkpoints
        needed = 12 * sum(math.prod(shape_of(p)) for p in engine.parameters.values())  # weights and two moments
        checkpoint.save(self.out.checkpoints, step, progress, engine.write, keep, needed, self.world)

    def restore(self, engine: Engine, state: checkpoint.State | None) -> None:
        """The engine as it was at the checkpoint, and torch's generator; at the start, the generator seeded."""
        # dropout draws from it: each process another mask
        torch.manual_seed(self.config.seed if self.world.size == 1 else seed_of(self.config.seed, self.world.rank))
        if state is None:
            return
        together(self.world, lambda: engine.read(state.path))
        self.log.say(f"resumed {self.out.path} at step {state.step}")
        if self.plan.num_steps > self.plan.schedule_steps:
            self.log.say(f"steps after {self.plan.schedule_steps} keep the schedule's last learning rate")

    def hash_of_start(self, engine: Engine) -> str:
        """What the model's weights are, see align.models.weights_hash; before anything is restored."""
        own = ((name.removeprefix("model."), w) for name, w in engine.weights() if name.startswith("model."))
        if self.world.lead:
            return self.world.share(weights_hash(engine.policy.model, own))
        for _ in own:  # the others take part in gathering
            pass
        return self.world.share("")

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
        return self.world.share(not checkpoint.problem(self.out.final))

    def _resolved(self) -> dict[str, Any]:
        return self.out.read_json("resolved.json") or {}

    def _resolve(self, **found: str) -> None:
        self.out.write_json("resolved.json", self._resolved() | found)


def _held(stage: int | None, processes: int) -> float:
    """Share of gradients (4 bytes a weight) and moments (8) that a process of a ZeRO stage holds."""
    if not stage:
        return 1.0
    return (4 + 8 / processes) / 12 if stage == 1 else 1 / processes


def start(config: Config, command: str, objective: Any, make: Callable[..., Run]) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    if not torch.cuda.is_available():  # DeepSpeed, which PEFT imports, warns of what everyone here knows
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world = join(config.engine.timeout_s)
    try:
        return _in_directory(config, command, objective, make, world)
    finally:
        leave()


def _fill(network: Network | None, engine: Engine) -> None:
    """Give a network the weights of the engine's policy; without one only take part in gathering them."""
    own = {} if network is None else network.state_dict()
    with torch.no_grad():
        for name, weight in engine.weights():
            if own:
                own[name].copy_(weight)


def _in_directory(config: Config, command: str, objective: Any, make: Callable[..., Run], world: World) -> int:
    out = RunDirectory(config, world)
    log = Log(out.path, config.log, {"recipe": config.choices.get("recipe")}, mute=not world.lead)
    try:
        with Signals(world) as signals:
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
