"""Which examples a step has when sources are mixed by shares, and rows drawn by weights: docs/data.md, "Mixing".

A function of the step, the seed and the shares so far: no position is kept, no draw depends on the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from align.trainers.loop import Plan


class Shares(Protocol):
    """How much of a step each source has."""

    def at(self, step: int) -> np.ndarray:
        """Shares [K] of step 1, 2, ..., of sum 1. What was once said of a step stays."""
        ...


def by_temperature(sizes: Sequence[int], temperature: float) -> np.ndarray:
    """Shares n^(1/T) / sum [K]: T = 1 in proportion to the sizes, larger T more even, infinity all alike.

    Devlin et al. 2019 (multilingual BERT), T = 1/0.7; Raffel et al. 2020, arXiv 1910.10683.
    """
    logs = np.log(np.asarray(sizes, dtype=float)) / temperature
    powers = np.exp(logs - logs.max())
    return powers / powers.sum()


@dataclass(frozen=True)
class Scheduled:
    """Shares in straight lines between points: (progress in [0, 1], shares). Progress is 0 at the first step and 1 at
    the last one of the learning rate's schedule; before the first point and after the last one they stay."""

    points: Sequence[tuple[float, Sequence[float]]]
    horizon: int

    def at(self, step: int) -> np.ndarray:
        """See Shares."""
        progress = (step - 1) / max(1, self.horizon - 1)
        places = [place for place, _ in self.points]
        rows = np.array([np.asarray(row, dtype=float) / sum(row) for _, row in self.points])
        return np.array([np.interp(progress, places, column) for column in rows.T])


def constant(sizes: Sequence[int], temperature: float) -> Scheduled:
    """Shares by the sizes, the same in every step."""
    return Scheduled([(0.0, by_temperature(sizes, temperature).tolist())], 1)


class Learnt:
    """Shares that are changed while the run goes: (first step, shares), the first of them from step 1 on."""

    def __init__(self, sizes: Sequence[int]):
        self.changes: list[tuple[int, list[float]]] = [(1, by_temperature(sizes, 1.0).tolist())]

    def at(self, step: int) -> np.ndarray:
        """See Shares."""
        return np.array(next(shares for first, shares in reversed(self.changes) if first <= step))


class Draws:
    """How many examples of each source the steps up to one have: its shares' sum times the batch, to about one."""

    def __init__(self, shares: Shares, num_sources: int, batch_size: int):
        self.shares = shares
        self.batch_size = batch_size
        self._drawn = [np.zeros(num_sources, dtype=int)]  # [step][source]
        self._owed = np.zeros(num_sources)

    def until(self, step: int) -> list[int]:
        """Of steps 1 to `step` together, by source."""
        while len(self._drawn) <= step:
            self._owed = self._owed + self.batch_size * self.shares.at(len(self._drawn))
            self._drawn.append(_apportioned(self._owed, self._drawn[-1], self.batch_size))
        return self._drawn[step].tolist()


class Mixture(Plan):
    """A plan whose steps take each source's share; within a source every row comes once an epoch of its own, or by its
    weight as often as that gives, rounded up or down."""

    def __init__(self, plan: Plan, sizes: Sequence[int], shares: Shares, weights: Sequence[float] | None = None):
        super().__init__(plan.num_examples, plan.batch_size, plan.num_steps, plan.schedule_steps, plan.limit)
        borders = [0, *np.cumsum(sizes).tolist()]
        self.draws = Draws(shares, len(sizes), plan.batch_size)
        self.parts = list(pairwise(borders))  # first and last example of each source
        self._weights = None if weights is None else [np.array(weights[a:b]) for a, b in self.parts]
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def indices(self, step: int, seed: int) -> list[int]:
        """Examples of optimiser step 1, 2, ...; of the last one what the number of epochs leaves."""
        before, after = self.draws.until(step - 1), self.draws.until(step)
        out = [
            self.parts[k][0] + self._place(k, draw, seed)
            for k in range(len(self.parts))
            for draw in range(before[k], after[k])
        ]
        return out[: int(min(self.batch_size, self.limit - (step - 1) * self.batch_size))]

    def _place(self, source: int, draw: int, seed: int) -> int:
        first, last = self.parts[source]
        epoch, position = divmod(draw, last - first)
        key = (source, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == source and k[1] < epoch - 1]:
                del self._orders[old]
            rng = np.random.default_rng([seed, source, epoch])
            self._orders[key] = _order(last - first, None if self._weights is None else self._weights[source], rng)
        return int(self._orders[key][position])


def _apportioned(owed: np.ndarray, drawn: np.ndarray, size: int) -> np.ndarray:
    """Draws [K] after `size` more of them: one by one to the source that is owed most; the first on ties."""
    wanted = owed - drawn
    more = np.floor(np.clip(wanted, 0, None)).astype(int)
    while more.sum() > size:
        more[np.argmin(np.where(more > 0, wanted - more, np.inf))] -= 1
    while more.sum() < size:
        more[np.argmax(wanted - more)] += 1
    return drawn + more


def _order(n: int, weights: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """n places of n rows in random order: each once, or by systematic sampling n w / sum(w) times, rounded up or down
    so that this is the mean."""
    if weights is None:
        return rng.permutation(n)
    borders = np.cumsum(weights, dtype=float)
    marks = (rng.random() + np.arange(n)) * (borders[-1] / n)
    return rng.permutation(np.minimum(np.searchsorted(borders, marks, side="right"), n - 1))
