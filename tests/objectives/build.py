"""Batches and statistics by hand, in float64, and the loop's reduction: what tests of objectives share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from align.packing import with_extras
from align.sums import positive, row_sums
from align.types import Extras, Losses, PackedBatch, Stats


def batch_of(row: Tensor, num_rows: int, num_columns: int = 2, weights: Tensor | None = None, **fields) -> PackedBatch:
    """A batch with what objectives read. Rows are column by column: all chosen, then all rejected, ..."""
    groups = torch.arange(num_rows).view(num_columns, -1).T
    lengths = torch.bincount(row, minlength=num_rows) if weights is None else row_sums(weights, row, num_rows)
    empty = torch.zeros(0, dtype=torch.long)
    return PackedBatch(
        input_ids=empty, position_ids=empty, segments=(), padded_shape=None, row_lengths=(), target_index=empty,
        target_ids=empty, target_weights=weights, row=row, lengths=lengths, groups=groups, last_index=empty,
        sources=tuple(f"file:{i + 1}" for i in range(len(groups))), origins=("",) * len(groups), **fields,
    )  # fmt: skip


def stats_of(token_logps: Tensor, batch: PackedBatch, **extras: Tensor) -> Stats:
    """Statistics [C] of a network that gives the targets of a batch these log-probs."""
    weighted = token_logps if batch.target_weights is None else token_logps * batch.target_weights
    return Stats(token_logps, row_sums(weighted, batch.row, len(batch.lengths)), batch.lengths, batch.row, **extras)


def rows_of(values: Sequence[Sequence[float]], num_columns: int = 2, **fields) -> tuple[Stats, PackedBatch]:
    """Statistics, with token_logps as a leaf, and batch of sequences given as their token log-probs."""
    flat = torch.tensor([v for r in values for v in r], dtype=torch.float64, requires_grad=True)
    row = torch.tensor([i for i, r in enumerate(values) for _ in r], dtype=torch.long)
    batch = batch_of(row, len(values), num_columns, **fields)
    return stats_of(flat, batch), batch


def select(stats: Stats, batch: PackedBatch, examples: Sequence[int]) -> tuple[Stats, PackedBatch]:
    """The part of a batch that holds these examples only, as a micro-batch of the same step."""
    index = torch.tensor(examples)
    groups = batch.groups[index]  # [p, R]
    rows = groups.T.reshape(-1)
    keep = torch.cat([(batch.row == r).nonzero()[:, 0] for r in rows.tolist()])
    new_row = torch.cat([torch.full((int((batch.row == r).sum()),), i) for i, r in enumerate(rows.tolist())])
    part = replace(
        batch, row=new_row, lengths=batch.lengths[rows], groups=torch.arange(len(rows)).view(groups.shape[1], -1).T,
        target_weights=None if batch.target_weights is None else batch.target_weights[keep],
        labels=None if batch.labels is None else batch.labels[index],
        numbers={name: values[index] for name, values in batch.numbers.items()},
        sources=tuple(batch.sources[i] for i in examples), origins=tuple(batch.origins[i] for i in examples),
        extras=Extras({**batch.extras, "step_index": index}),
    )  # fmt: skip
    extras = {n: getattr(stats, n) for n in ("log_collision", "log_max", "entropy") if getattr(stats, n) is not None}
    return stats_of(stats.token_logps[keep], part, **{n: v[keep] for n, v in extras.items()}), part


def reduced(out: Losses, whole: PackedBatch) -> Tensor:
    """The share of `out` in the loss of the step `whole`, as the loop computes it."""
    total = torch.zeros((), dtype=torch.float64)
    for term in out.terms:
        if term.unit == "example":
            count = len(whole.groups)
        else:
            assert term.unit == "token"
            rows = slice(None) if term.column is None else whole.groups[:, term.column]
            count = positive(whole.lengths[rows].sum())
        total = total + term.weight * term.losses.sum() / count
    return total


def with_step(objective, policy: Stats, reference: Stats | None, batch: PackedBatch) -> PackedBatch:
    """The batch as one whole step, with what an objective of step_rows="examples" computed of it."""
    values = objective.step_values(policy, reference, batch)
    assert not values.requires_grad
    return with_extras(batch, {"step_values": values, "step_index": torch.arange(len(batch.groups))})
