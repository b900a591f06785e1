"""Refusals of settings and data that cannot be, in one wording; each names the setting as the user types it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from align.deferred import Tensor, torch
from align.types import PackedBatch


def positive_value(key: str, value: float) -> None:
    """Raises ValueError unless value is a number and 0 < value < inf."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{key}={value}: must be greater than 0")


def not_negative(key: str, value: float) -> None:
    """Raises ValueError unless value is a number and 0 <= value < inf."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{key}={value}: must be at least 0")


def within(key: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless value is a number and low <= value < high."""
    if not _is_number(value) or not low <= value < high:
        raise ValueError(f"{key}={value}: must be at least {low} and below {high}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")


def needed_number(batch: PackedBatch, name: str, who: str, where: Tensor | None = None) -> Tensor:
    """The number [P] of that name of each example; NaN is allowed outside of the mask `where` [P] only.

    Raises ValueError, with the place of a row that lacks it.
    """
    values = batch.numbers.get(name, torch.full((len(batch.groups),), math.nan, device=batch.groups.device))
    missing = values.isnan() if where is None else values.isnan() & where
    if missing.any():
        source = batch.sources[int(missing.int().argmax())]
        raise ValueError(f'{source}: {who} needs a number of the row: add "numbers": {{"{name}": ...}} to it')
    return values
