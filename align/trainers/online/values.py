"""Token statistics of a policy and of what it is compared with, over the completions of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align.trainers.loop import TrainContext, token_values
from align.trainers.session import Session
from align.types import Example, PackedBatch, Stats

Forward = Callable[[PackedBatch], Stats]


def values(
    session: Session,
    context: TrainContext,
    network: Forward,
    parts: Sequence[Example],
    names: Sequence[str] = ("token_logps",),
) -> dict[str, list[list[np.ndarray]]]:
    """By name, for each example and each of its rows, an array [targets of the row]; all processes get all of them."""
    engine = context.engine
    engine.policy.eval()
    return token_values(
        network,
        parts,
        engine.policy.layout,
        context.max_tokens,
        engine.policy.device,
        names,
        session.signals.check,
        session.world,
    )


def own(context: TrainContext, needs: frozenset[str] = frozenset()) -> Forward:
    """The policy as it is."""

    def forward(batch: Any) -> Any:
        return context.engine.forward(batch, needs)

    return forward


def flat(parts: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Of all rows in order."""
    return [rows for part in parts for rows in part]
