"""What the engine tests run alike in one process and in several: networks, steps over uneven micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from align.config import EngineConfig
from align.engine.base import Engine
from align.engine.deepspeed import DeepSpeedEngine
from align.engine.local import LocalEngine
from align.engine.world import World
from align.models.logprobs import cached_stats
from align.models.policy import Network, Policy, ScoreHead, Scorer, enable_activation_checkpointing, lora
from align.objectives.losses import Sigmoid
from align.objectives.reward_model import BradleyTerry
from align.packing import pack
from align.types import Example
from tests.conftest import plain_dpo, random_pair, tiny_model
from tests.engine.test_local import optimizer

LR = 0.01
OPTIMIZER = dict(max_grad_norm=0.5, weight_decay=0.1)
VALUE_SCALE = 3.0
# Pairs in each micro-batch of a step: dealt to processes in turn, these hold different amounts of work.
PARTS = (1, 4, 2, 1)


def pairs() -> list[Example]:
    """32 pairs, four steps' worth."""
    rng = np.random.default_rng(0)
    return [random_pair(rng) for _ in range(4 * sum(PARTS))]


def tied() -> Network:
    """A policy whose head shares the embedding's weight."""
    return Policy(tiny_model("llama", torch.float32), "packed")


def untied() -> Network:
    """A policy with a head of its own."""
    return Policy(tiny_model("llama", torch.float32, tie_word_embeddings=False), "packed")


def adapters(dropout: float = 0.0) -> Network:
    """LoRA on every linear layer."""
    model = tiny_model("llama", torch.float32)
    return Policy(lora(model, rank=4, alpha=8.0, dropout=dropout, targets="all-linear", seed=3), "packed")


def narrow_base() -> Network:
    """LoRA in float32 on weights in bfloat16."""
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=False)
    return Policy(lora(model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=3), "packed")


def dropout() -> Network:
    """LoRA whose dropout draws from the generator."""
    return adapters(0.2)


def recomputed() -> Network:
    """A policy that computes its activations again in the backward."""
    network = tied()
    enable_activation_checkpointing(network, "full")
    return network


def valued() -> Network:
    """A policy with a value head, whose learning rate is its own."""
    return Policy(tiny_model("llama", torch.float32), "packed", value_head=True)


def scorer() -> Network:
    """A reward model."""
    model = tiny_model("llama", torch.float32)
    torch.manual_seed(5)
    return Scorer(model, "packed", ScoreHead(32, 1))


NETWORKS: dict[str, Callable[[], Network]] = {
    f.__name__: f for f in (tied, untied, adapters, narrow_base, dropout, recomputed, valued, scorer)
}


def engine(
    name: str,
    stage: int | None,
    world: World,
    offload: str = "",
    precision: torch.dtype = torch.float32,
    small: bool = False,
) -> Engine:
    """An engine of a network above; stage None: LocalEngine. offload: any of the letters o and p. small: DeepSpeed's
    buckets hold a few weights."""
    network = NETWORKS[name]().train()
    config = optimizer(**OPTIMIZER)
    if stage is None:
        return LocalEngine(network, config, precision, VALUE_SCALE, seed=11)
    zero = {"reduce_bucket_size": 3000, "sub_group_size": 2000, "stage3_param_persistence_threshold": 0}
    extra = {"zero_optimization": zero} if small else {}
    settings = EngineConfig(stage, "o" in offload, "p" in offload, 60.0, extra)
    return DeepSpeedEngine(network, config, settings, precision, world, VALUE_SCALE, seed=11)


def step(own: Engine, number: int, scale: float = 1.0) -> tuple[float, float]:
    """One optimiser step over the step's pairs, as the loop takes it: the loss of the whole batch and the norm."""
    loss, norm = accumulate(own, number, scale)
    own.step(LR)
    return loss, norm


def accumulate(own: Engine, number: int, scale: float = 1.0) -> tuple[float, float]:
    """Everything of a step before the weights are touched. scale: of this process's loss."""
    world = own.world
    chosen = pairs()[number * sum(PARTS) : (number + 1) * sum(PARTS)]
    borders = np.cumsum((0, *PARTS))
    parts = [chosen[a:b] for a, b in zip(borders[:-1], borders[1:], strict=True)]
    mine = parts[world.rank :: world.size]
    total = 0.0
    for i, part in enumerate(mine):
        loss = scale * _loss(own, part) / len(chosen)
        total += float(loss.detach())
        own.backward(loss, last=i == len(mine) - 1)
    return world.sum([total])[0], float(own.gradient_norm())


def _loss(own: Engine, part: Sequence[Example]) -> torch.Tensor:
    """The sum over the pairs of a micro-batch."""
    batch = pack(part, "packed")
    if isinstance(own.policy, Scorer):
        objective = BradleyTerry(1.0, None, 0.1, 0.0)
        out = objective(own.forward(batch, objective.needs), None, batch)
        return sum(term.weight * term.losses.sum() for term in out.terms)
    valued_too = own.policy.value_head is not None
    batch = replace(batch, reference_token_logps=-(batch.target_ids % 7).float())
    objective = plain_dpo(0.1, Sigmoid(0.0))
    policy = own.forward(batch, frozenset({"values"}) if valued_too else frozenset())
    out = objective(policy, cached_stats(batch.reference_token_logps, batch), batch)
    loss = sum(term.weight * term.losses.sum() for term in out.terms)
    return loss + (policy.values - 1).square().sum() if valued_too else loss
