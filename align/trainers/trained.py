"""The model of a run: loaded once, with the adapters and heads that are trained, whole again where it is sharded,
and written in Hugging Face form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config import Config
from align.engine.base import Engine, shape_of
from align.engine.world import by_lead, together
from align.jsons import Json
from align.models.device import available_bytes, memory_plan, pick_activation_checkpointing, pick_device
from align.models.policy import Network, choose_layout, enable_activation_checkpointing, lora, weights_hash
from align.models.remembered import key_of, recall, remember
from align.trainers.final import write_final
from align.trainers.session import Session
from align.types import Layout

Make = Callable[[Any, Layout], Network]


def load(session: Session) -> Any:
    """The model as it is before training."""
    c = session.config
    if c.engine.stage != 3:
        return load_unsharded(session)
    from align.engine.loading import load_sharded

    whole = c.lora.rank == 0 and not c.head.only
    return load_sharded(session.pretrained, c.engine, c.optimizer, session.world, whole, session.log.say)


def load_unsharded(session: Session) -> Any:
    """The same with all its weights in this process, whatever the engine."""
    return session.pretrained.model().to(pick_device())


@dataclass(frozen=True)
class Trained:
    """A network that is to be trained. make: it, of a model in a layout."""

    session: Session
    network: Network
    generation_config: Any
    make: Make
    layout: Layout
    activation_checkpointing: str
    lines: tuple[str, ...]  # of the log: what was chosen, and why

    def copy(self, device: torch.device) -> Network:
        """Another one as it was before training, not to be trained."""
        model = self.session.pretrained.model().to(device)
        return _network(self.session.config, model, self.make, self.layout).eval().requires_grad_(False)


def prepare(session: Session, model: Any, stream_tokens: int, make: Make) -> Trained:
    """What is trained of a loaded model, in the layout and with the activation checkpointing that fit.

    stream_tokens: of the largest step's pass.
    """
    config = session.config
    layout, layout_why = choose_layout(model, config.trainer.layout, config.lora.dropout)
    generation_config = model.generation_config
    network = _network(config, model, make, layout)
    trained = sum(math.prod(shape_of(p)) for p in network.parameters() if p.requires_grad)
    total = sum(math.prod(shape_of(p)) for p in network.parameters())
    tokens = min(config.trainer.micro_batch_tokens, stream_tokens)
    held = round(trained * _held(config.engine.stage, session.world.size))
    memory = memory_plan(network.causal_lm.config, held, tokens, session.precision)
    wanted = config.trainer.activation_checkpointing
    wanted = session.out.resolved().get("recompute", wanted) if wanted == "auto" else wanted
    device = pick_device()
    # on one node processes on the host share its memory
    free = available_bytes(device) // (session.world.size if device.type == "cpu" else 1)
    activation_checkpointing, checkpointing_why = session.world.share(
        pick_activation_checkpointing(wanted, memory, free)
    )
    enable_activation_checkpointing(network, activation_checkpointing)
    session.out.resolve(recompute=activation_checkpointing, layout=layout)
    name, precision = session.pretrained.name, session.precision_name
    lines = (
        f"model {name}: {total / 1e6:.1f}M weights, {trained / 1e6:.2f}M trained, on {device.type}",
        f"layout {layout} ({layout_why})",
        f"precision {precision} ({session.precision_why}); "
        f"activation checkpointing {activation_checkpointing} ({checkpointing_why})",
    )
    return Trained(session, network, generation_config, make, layout, activation_checkpointing, lines)


def _network(config: Config, model: Any, make: Make, layout: Layout) -> Network:
    """What is trained of a model: with its adapters and heads, without dropout that nobody asked for."""
    settings = config.lora
    if settings.rank > 0:
        model = lora(
            model,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=settings.targets,
            seed=config.seed,
        )
    else:
        model = model.float()
    network = make(model, layout)
    for name, module in network.named_modules():  # LoRA's and the head's are the only ones that were asked for
        asked = ".lora_dropout." in name or name.startswith("head.")
        if isinstance(module, torch.nn.Dropout) and not asked:
            module.p = 0.0
    return network


def _held(stage: int | None, processes: int) -> float:
    """Share of gradients (4 bytes a weight) and moments (8) that a process of a ZeRO stage holds."""
    if not stage:
        return 1.0
    return (4 + 8 / processes) / 12 if stage == 1 else 1 / processes


class FullModel:
    """The policy of an engine with all its weights in one process."""

    def __init__(self, trained: Trained, engine: Engine):
        self.trained = trained
        self.engine = engine
        self.session = trained.session
        self._copy: Network | None = None

    def __call__(self) -> Any:
        """In this process, as it is now: the engine's own, or a copy on the device where that one is sharded. All
        processes must ask."""
        if not self.engine.sharded:
            return self.engine.policy
        if self._copy is None:
            self._copy = together(self.session.world, lambda: self.trained.copy(pick_device()))
        fill(self._copy, self.engine.weights())
        return self._copy

    def hash(self, from_files: bool = True) -> str:
        """What the model's weights are, see align.models.policy.weights_hash; before anything is restored. from_files:
        they are those of the session's model, read by this start."""
        world = self.session.world
        key = self._key() if from_files and world.lead else None
        known = world.share(recall(key))
        if known is None:
            known = self._hash()
            if world.lead:
                remember(key, known)
        return known

    def _key(self) -> str | None:
        config, model = self.session.config, self.engine.policy.model
        dtypes = sorted({str(weight.dtype) for weight in model.parameters()})
        kinds = type(model).__name__, type(self.engine.policy.causal_lm).__name__
        trained = vars(config.lora), config.head.only
        since = time.time() - self.session.seconds()
        return key_of(self.session.pretrained.held(), since, config.model, dtypes, kinds, trained)

    def _hash(self) -> str:
        world, weights = self.session.world, self.engine.weights()
        own = ((name.removeprefix("model."), w) for name, w in weights if name.startswith("model."))
        if world.lead:
            return world.share(weights_hash(self.engine.policy.model, own))
        for _ in own:  # the others take part in gathering
            pass
        return world.share("")

    def write(self, target: Path, summary: Json, form: Json | None = None) -> None:
        """Weights as they are now, in Hugging Face form, by the lead; see align.trainers.final."""
        network = self.engine.policy
        if self.engine.sharded:  # in the lead's memory alone
            network = by_lead(self.session.world, lambda: self.trained.copy(torch.device("cpu")))
            fill(network, self.engine.weights())
        by_lead(self.session.world, lambda: self._write(target, network, summary, form))

    def write_of(self, weights: dict[str, Tensor], target: Path, summary: Json, form: Json | None = None) -> None:
        """The same of other weights, by name, of those that are trained; the lead's are taken."""

        def write() -> None:
            with torch.random.fork_rng():  # what follows draws as if nothing had been written
                network = self.trained.copy(torch.device("cpu"))
            fill(network, weights.items())
            self._write(target, network, summary, form)

        by_lead(self.session.world, write)

    def _write(self, target: Path, network: Network, summary: Json, form: Json | None) -> None:
        s = self.session
        generation = self.trained.generation_config
        name = s.pretrained.name
        write_final(target, network, s.tokenizer, generation, s.config, name, s.command, summary, form)


def fill(network: Network | None, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a network these weights; without one only take part in gathering them."""
    own = {} if network is None else network.state_dict()
    with torch.no_grad():
        for name, weight in weights:
            if own:
                own[name].copy_(weight)
