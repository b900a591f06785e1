"""Sums over rows of packed tokens."""

from __future__ import annotations

from align.deferred import Tensor, torch
from align.types import PackedBatch


def target_sums(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sums [N] of token values [C] over the targets of each sequence, each times its weight."""
    weighted = values if batch.target_weights is None else values * batch.target_weights
    return row_sums(weighted, batch.row, len(batch.lengths))


def positive(lengths: Tensor) -> Tensor:
    """Lengths to divide by: those of sequences without targets become 1, whose sums are 0."""
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def row_sums(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sums [N] of token values [C] over the sequences they belong to; a sequence without targets has 0."""
    # In float64: added one by one, a float32 sum of some hundred nats loses 3e-4 of a nat, of the size of a
    # small log-ratio's error bar; rounding once at the end loses 5e-5.
    wide = values.new_zeros(num_rows, dtype=torch.float64).index_add(0, row, values.double())
    return wide.to(values.dtype)
