"""Scores of a reward model's head and their batch by hand, in float64: what tests of its objectives share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from align.types import Extras, PackedBatch, Stats
from tests.objectives.build import batch_of

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "reward_public.json").read_text())


def named(algorithm: str) -> list[dict]:
    """The vectors of an algorithm."""
    found = [e for e in VECTORS if e["algorithm"] == algorithm]
    assert found
    return found


def leaf(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def scored(*columns: Tensor, gates: Tensor | None = None, **numbers: Sequence[float]) -> tuple[Stats, PackedBatch]:
    """Stats and batch of examples whose rows have these scores: a tensor [P] or [P, D] for each row of an example.

    gates: [P, D / 2], of every row of an example.
    """
    scores = torch.cat([c[:, None] if c.ndim == 1 else c for c in columns])
    batch = batch_of(
        torch.zeros(0, dtype=torch.long), len(scores), len(columns),
        numbers={name: torch.as_tensor(values, dtype=torch.float64) for name, values in numbers.items()},
    )  # fmt: skip
    return stats(scores, batch, None if gates is None else gates.repeat(len(columns), 1)), batch


def listed(*lists: Tensor) -> tuple[Stats, PackedBatch]:
    """Stats and batch of ranked lists with these scores, each [its length]."""
    groups = torch.full((len(lists), max(len(x) for x in lists)), -1)
    first = 0
    for group, scores in zip(groups, lists, strict=True):
        group[: len(scores)] = torch.arange(first, first + len(scores))
        first += len(scores)
    batch = batch_of(torch.zeros(0, dtype=torch.long), first, first)
    batch = replace(batch, groups=groups, sources=tuple(f"file:{i + 1}" for i in range(len(lists))))
    return stats(torch.cat(lists)[:, None], batch), batch


def stats(scores: Tensor, batch: PackedBatch, gates: Tensor | None = None) -> Stats:
    empty = scores.new_zeros(0)
    extras = Extras() if gates is None else Extras(gates=gates)
    return Stats(empty, empty, batch.lengths, batch.row, scores=scores, extras=extras)


def part(policy: Stats, batch: PackedBatch, examples: Sequence[int]) -> tuple[Stats, PackedBatch]:
    """The part of a batch that holds these examples only, as a micro-batch of the same step."""
    groups = batch.groups[torch.tensor(examples)]
    groups = groups[:, : int((groups >= 0).sum(1).max())]  # padded to the longest list of the part
    rows = groups[groups >= 0]
    new = torch.full_like(groups, -1)
    new[groups >= 0] = torch.arange(len(rows))
    small = replace(
        batch, groups=new, lengths=batch.lengths[rows], sources=tuple(batch.sources[i] for i in examples),
        numbers={name: values[torch.tensor(examples)] for name, values in batch.numbers.items()},
    )  # fmt: skip
    assert policy.scores is not None
    gates = policy.extras.get("gates")
    return stats(policy.scores[rows], small, None if gates is None else gates[rows]), small
