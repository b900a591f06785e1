"""The offline loop: which pairs make a step, forward, loss over the global count, backward, step, metrics.

Blind to the algorithm: an objective says what it needs and what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from align.config import TrainerConfig
from align.engine.local import LocalEngine
from align.packing import micro_batches, num_tokens, pack, to_device
from align.stats import reference_stats
from align.types import Layout, Losses, PackedBatch, Pair, Stats


class NonFinite(RuntimeError):
    """The loss or its gradient is no number; the message names the rows."""


@dataclass(frozen=True)
class Plan:
    """Which steps a run takes."""

    num_pairs: int
    batch_size: int
    num_steps: int  # after which the run is complete
    schedule_steps: int

    def indices(self, step: int, seed: int) -> list[int]:
        """Pairs of optimiser step 1, 2, ...: consecutive parts of one permutation per epoch, each pair once.

        A function of the step alone: a resumed run needs no position, and no row is skipped or seen twice. With
        the number of epochs fixed the last step has what is left.
        """
        first = (step - 1) * self.batch_size
        last = min(first + self.batch_size, self.limit)
        out = []
        for k in range(first, last):
            epoch, position = divmod(k, self.num_pairs)
            out.append(int(_permutation(self.num_pairs, seed, epoch)[position]))
        return out

    limit: float = math.inf  # pairs seen in the whole run


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    key = (n, seed, epoch)
    if key not in _permutations:
        while len(_permutations) > 2:
            _permutations.pop(next(iter(_permutations)))
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(n)
    return _permutations[key]


def plan(config: TrainerConfig, num_pairs: int, schedule_steps: int | None) -> Plan:
    """The steps of a run; schedule_steps: the horizon fixed at its first start, None at that start."""
    if config.max_steps is not None:
        steps, limit = config.max_steps, math.inf
    else:
        limit = config.epochs * num_pairs
        steps = -(-limit // config.batch_size)
    horizon = schedule_steps or config.schedule_steps or steps
    return Plan(num_pairs, config.batch_size, steps, horizon, limit)


@dataclass(frozen=True)
class Trainee:
    """What the loop works with."""

    engine: LocalEngine
    objective: Any
    layout: Layout
    max_tokens: int  # of a micro-batch
    cached: Callable[[Sequence[Pair]], list[np.ndarray]] | None  # reference log-probs by pair
    reference: Callable[[PackedBatch], Stats] | None  # or the network to ask


def train_step(trainee: Trainee, pairs: Sequence[Pair], lr: float) -> dict[str, float]:
    """One optimiser step over all of `pairs`; returns its metrics.

    Raises NonFinite before the weights are touched.
    """
    engine = trainee.engine
    engine.policy.train()
    totals = _Totals(pairs)
    blamed = []
    for part in micro_batches(pairs, trainee.layout, trainee.max_tokens):
        batch, out = _losses(trainee, [pairs[i] for i in part])
        loss = totals.add(batch, out)
        if not torch.isfinite(loss.detach()):
            blamed += _blame(batch, out)
            continue
        engine.backward(loss)
    if blamed:
        raise NonFinite(f"the loss is not a number for {', '.join(blamed[:8])}")
    norm = engine.gradient_norm()
    if not math.isfinite(norm):
        rows = ", ".join(p.source for p in pairs[:8])
        raise NonFinite(f"the gradient is not a number; its batch holds {rows}")
    engine.step(lr)
    return totals.metrics("train") | {"optimizer/gradient_norm": norm, "optimizer/lr": lr}


@torch.no_grad()
def evaluate(trainee: Trainee, pairs: Sequence[Pair], check: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Metrics over held-out pairs. check is called between micro-batches and may raise."""
    trainee.engine.policy.eval()
    totals = _Totals(pairs)
    for part in micro_batches(pairs, trainee.layout, trainee.max_tokens):
        check()
        totals.add(*_losses(trainee, [pairs[i] for i in part]))
    return {k: v for k, v in totals.metrics("heldout").items() if not k.startswith("tokens/")}


def _losses(trainee: Trainee, pairs: Sequence[Pair]) -> tuple[PackedBatch, Losses]:
    device = trainee.engine.policy.device
    cached = trainee.cached(pairs) if trainee.cached is not None else None
    batch = to_device(pack(pairs, trainee.layout, cached), device)
    if cached is not None:
        reference = reference_stats(batch)
    elif trainee.reference is not None:
        with torch.no_grad():
            reference = trainee.reference(batch)
    else:
        reference = None
    policy = trainee.engine.forward(batch, trainee.objective.needs)
    return batch, trainee.objective(policy, reference, batch)


class _Totals:
    """Sums over the micro-batches of a step, divided by counts known before the first of them."""

    def __init__(self, pairs: Sequence[Pair]):
        targets = [int(row.targets.sum()) for p in pairs for row in (p.chosen, p.rejected)]
        self.counts = {"pair": len(pairs), "row": 2 * len(pairs), "token": max(1, sum(targets))}
        self.real = sum(len(row.token_ids) for p in pairs for row in (p.chosen, p.rejected))
        self.named = any(p.origin for p in pairs)  # of the whole step, not of a micro-batch
        self.processed = 0
        self.num_parts = 0
        self.loss = 0.0
        self.sums: dict[str, float] = {}
        self.origin_sums: dict[str, float] = {}
        self.origin_counts: dict[str, int] = {}

    def add(self, batch: PackedBatch, out: Losses) -> torch.Tensor:
        """The share of a micro-batch in the loss of the step."""
        loss = sum(term.weight * term.losses.sum() / self.counts[term.unit] for term in out.terms)
        assert isinstance(loss, torch.Tensor)
        self.loss += float(loss.detach())
        self.processed += len(batch.input_ids)
        self.num_parts += 1
        for name, values in out.metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
            if name in out.by_origin and self.named:
                for origin, value in zip(batch.origins, values.tolist(), strict=True):
                    key = f"{name}_{origin or 'unnamed'}"
                    self.origin_sums[key] = self.origin_sums.get(key, 0.0) + value
                    self.origin_counts[key] = self.origin_counts.get(key, 0) + 1
        return loss

    def metrics(self, split: str) -> dict[str, float]:
        """Means over all pairs. A name without a group gets the split as its second part; in held-out metrics the
        other names go into the group heldout."""
        means = {name: total / self.counts["pair"] for name, total in self.sums.items()}
        means |= {name: total / self.origin_counts[name] for name, total in self.origin_sums.items()}
        out = {"loss/total" if split == "train" else "loss/heldout": self.loss}
        for name, value in sorted(means.items()):
            if "/" not in name:
                out[f"{name}/{split}"] = value
            elif split == "train":
                out[name] = value
            else:
                out[f"heldout/{name.replace('/', '_')}"] = value
        out |= {
            "tokens/real": self.real,
            "tokens/processed": self.processed,
            "tokens/targets": self.counts["token"],
            "tokens/micro_batches": self.num_parts,
        }
        return out


def _blame(batch: PackedBatch, out: Losses) -> list[str]:
    """The rows of a micro-batch whose own loss is not finite, or all of them if none is singled out."""
    bad = []
    for term in out.terms:
        if term.unit == "pair":
            finite = torch.isfinite(term.losses.detach()).tolist()
            bad += [s for s, ok in zip(batch.sources, finite, strict=True) if not ok]
    return bad or list(batch.sources)


def token_plan(pairs: Sequence[Pair], layout: Layout, max_tokens: int) -> tuple[int, int]:
    """Tokens of a pass over the pairs in this layout, and with every sequence on its own.

    Raises ValueError if a pair does not fit a micro-batch: better now than in the middle of the run.
    """
    micro_batches(pairs, layout, max_tokens)
    stream = sum(num_tokens(p, layout) for p in pairs)
    return stream, sum(num_tokens(p, "packed") for p in pairs)
