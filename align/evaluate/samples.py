"""What a network answers to held-out prompts: greedy samples, their gold score, the KL to the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from align.models.policy import Network
from align.packing import micro_batches, pack_groups, to_device
from align.rollout.base import Completion
from align.types import PackedBatch, Row, Stats


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl."""

    phase: str  # before or after training
    step: int
    prompt: str
    completion: str
    finished: bool
    tokens: int
    gold: float | None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """A mean with the central 95 % of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """Mean of after - before over the same prompts, resampling prompts 10 000 times."""
    difference = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(difference), (10_000, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    return Interval(float(difference.mean()), float(low), float(high))


@torch.no_grad()
def sequence_kl(
    policy: Callable[[PackedBatch], Stats],
    reference: Callable[[PackedBatch], Stats],
    module: Network,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    max_tokens: int,
) -> float:
    """Monte Carlo KL(policy || reference), nats per completion, from completions the policy sampled.

    The k1 estimator: the mean of log policy - log reference over whole completions; unbiased, can be negative.
    """
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = np.array([*prompt, *completion.token_ids], dtype=np.int32)
        rows.append(Row(ids, np.arange(len(ids)) >= len(prompt)))
    groups = [(row,) for row in rows]
    sources = ["sample"] * len(rows)
    layout = "padded" if module.layout == "padded" else "packed"
    total = 0.0
    for part in micro_batches(groups, sources, layout, max(max_tokens, max(len(r.token_ids) for r in rows))):
        batch = to_device(pack_groups([groups[i] for i in part], layout, [sources[i] for i in part]), module.device)
        total += float((policy(batch).logps - reference(batch).logps).sum())
    return total / len(rows)
