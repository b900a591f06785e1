"""Thresholds looked for during one run by the simplex method of Nelder and Mead, as a state that can be saved.

The method is replayed from its first simplex over the points that have been measured so far: the first point it asks
for that has no value is the next to measure. So the state is the measurements, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from align.composers.base import by_name, count, named, positive, within
from align.deferred import torch
from align.jsons import Fields, Json

Point = tuple[float, ...]
MOVES_PER_POINT = 10  # a guard: moves to points already measured cost nothing and could go on for ever


class _Unmeasured(Exception):  # noqa: N818
    """The method wants the value of a point."""

    def __init__(self, point: Point):
        super().__init__(point)
        self.point = point


@dataclass(frozen=True)
class SimplexMethod:
    """Settings of the method: Nelder and Mead 1965.

    Contraction is inside, towards the worst point. A point within cache_tolerance of a measured one in every
    coordinate has its value. After a shrink it ends if the standard deviation of the values is below `spread`.
    """

    reflection: float
    expansion: float
    contraction: float
    shrinkage: float
    spread: float
    cache_tolerance: float

    def __post_init__(self) -> None:
        positive("search.method.reflection", self.reflection)
        positive("search.method.expansion", self.expansion)
        within("search.method.contraction", self.contraction, 0, 1)
        within("search.method.shrinkage", self.shrinkage, 0, 1)
        within("search.method.spread", self.spread, 0, math.inf)
        within("search.method.cache_tolerance", self.cache_tolerance, 0, math.inf)

    def replay(
        self, simplex: Sequence[Point], points: Sequence[Point], values: Sequence[float], max_moves: int
    ) -> tuple[Point | None, list[list[Point]]]:
        """The point to be measured next, None at the end; and the ordered simplex at the start of each move, and the
        last one at the end. values: of the points, to be minimised."""
        known = dict(zip(points, values, strict=True))

        def value(point: Point) -> float:
            if point in known:
                return known[point]
            for near, found in known.items():
                if all(abs(a - b) < self.cache_tolerance for a, b in zip(near, point, strict=True)):
                    return found
            raise _Unmeasured(point)

        history: list[list[Point]] = []
        current = list(simplex)
        try:
            for _ in range(max_moves):
                current = sorted(current, key=value)
                history.append(list(current))
                if self._move(current, value):
                    break
        except _Unmeasured as wanted:
            return wanted.point, history
        return None, [*history, list(current)]

    def _move(self, simplex: list[Point], value: Callable[[Point], float]) -> bool:
        """Change an ordered simplex; returns whether it is the last move."""
        best, worst = simplex[0], simplex[-1]
        centre = tuple(sum(xs) / len(xs) for xs in zip(*simplex[:-1], strict=True))
        reflected = _towards(centre, worst, -self.reflection)
        if value(best) <= value(reflected) < value(simplex[-2]):
            simplex[-1] = reflected
            return False
        if value(reflected) < value(best):
            expanded = _towards(centre, reflected, self.expansion)
            simplex[-1] = expanded if value(expanded) < value(best) else reflected
            return False
        contracted = _towards(centre, worst, self.contraction)
        if value(contracted) < value(worst):
            simplex[-1] = contracted
            return False
        simplex[1:] = [_towards(best, point, self.shrinkage) for point in simplex[1:]]
        found = [value(point) for point in simplex]
        mean = sum(found) / len(found)
        return math.sqrt(sum((v - mean) ** 2 for v in found) / len(found)) < self.spread


def _towards(a: Point, b: Point, factor: float) -> Point:
    return tuple(x + factor * (y - x) for x, y in zip(a, b, strict=True))


def drawn_simplex(low: Sequence[float], high: Sequence[float], seed: int) -> list[Point]:
    """N + 1 points, uniform between low and high [N]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(low) + 1, len(low), generator=generator, dtype=torch.float64).tolist()
    return [tuple(a + u * (b - a) for a, b, u in zip(low, high, row, strict=True)) for row in draws]


class ThresholdSearch:
    """Thresholds that make a held-out metric largest, each tried by training towards it from where the policy is.

    Nothing is reset between points. A point is measured after `steps` updates, or earlier, at every `check_every`-th,
    once all means are within `band` of their threshold (a fraction of it). After `max_points` measurements, or when the
    method ends, the best point stays. Moskovitz et al. 2023, NM-PPO, arXiv 2310.04373; ConstrainedRL4LMs@11ac8fe.
    """

    def __init__(
        self,
        *,
        low: Mapping[str, float],
        high: Mapping[str, float],
        metric: str,
        steps: int,
        check_every: int,
        band: float,
        max_points: int,
        seed: int,
        method: SimplexMethod,
    ):
        if not low or low.keys() != high.keys():
            raise ValueError("composer.search: low and high must name the same components, at least one")
        self.names = tuple(str(name) for name in low)
        bottom, top = by_name(low, self.names, "search.low"), by_name(high, self.names, "search.high")
        for name in self.names:
            if not bottom[name] < top[name]:
                raise ValueError(f"composer.search.low.{name}={low[name]:g}: must be below high, {high[name]:g}")
        for key, number in (("steps", steps), ("check_every", check_every), ("max_points", max_points)):
            count(f"search.{key}", number)
        within("search.band", band, 0, 1)
        if max_points <= len(self.names) + 1:
            raise ValueError(f"composer.search.max_points={max_points}: the first simplex has {len(self.names) + 1}")
        self.metric, self.steps, self.check_every, self.band = metric, steps, check_every, band
        self.max_points, self.method = max_points, method
        self._bounds, self._seed = (list(bottom.values()), list(top.values())), seed
        self._points: list[Point] = []
        self._values: list[float] = []  # minus the metric
        self._waited = 0
        self._reached = False

    @cached_property  # drawn by torch, which checking settings does without
    def _simplex(self) -> list[Point]:
        return drawn_simplex(*self._bounds, self._seed)

    @cached_property
    def _asked(self) -> Point | None:
        if len(self._points) >= self.max_points:
            return None
        moves = MOVES_PER_POINT * self.max_points
        return self.method.replay(self._simplex, self._points, self._values, moves)[0]

    @property
    def finished(self) -> bool:
        """Whether no further point is tried."""
        return self._asked is None

    @property
    def point(self) -> Point:
        """The thresholds to train towards, in the order of names."""
        if self._asked is not None:
            return self._asked
        return self._points[min(range(len(self._values)), key=self._values.__getitem__)]

    @property
    def due(self) -> bool:
        """Whether the point is to be measured now."""
        return not self.finished and (self._waited >= self.steps or self._reached)

    def waited(self, means: Mapping[str, float]) -> None:
        """An update of the policy with these mean rewards has passed."""
        if self.finished:
            return
        self._waited += 1
        near = all(abs(means[n] - t) <= self.band * abs(t) for n, t in zip(self.names, self.point, strict=True))
        self._reached = near and self._waited % self.check_every == 0

    def tell(self, gold: float) -> None:
        """The metric at the point. Raises ValueError for what is no number."""
        if not math.isfinite(gold):
            raise ValueError(f"composer.search.metric={self.metric}: is {gold}; the search needs a finite number")
        assert self._asked is not None
        self._points.append(self._asked)
        self._values.append(-gold)
        self._waited, self._reached = 0, False
        del self._asked

    def metrics(self) -> dict[str, float]:
        """search/points, search/best_NAME, search/best_score, search/finished."""
        out = {"search/points": float(len(self._points)), "search/finished": float(self.finished)}
        if self._points:
            place = min(range(len(self._values)), key=self._values.__getitem__)
            out |= named("search", [f"best_{n}" for n in self.names], self._points[place])
            out["search/best_score"] = -self._values[place]
        return out

    def state_dict(self) -> Json:
        """JSON."""
        return {
            "simplex": [list(p) for p in self._simplex],
            "points": [list(p) for p in self._points],
            "values": list(self._values),
            "waited": self._waited,
            "reached": self._reached,
        }

    def load_state_dict(self, state: Fields) -> None:
        """The inverse."""
        self._simplex = [tuple(p) for p in state["simplex"]]
        self._points = [tuple(p) for p in state["points"]]
        self._values = list(state["values"])
        self._waited, self._reached = state["waited"], state["reached"]
        vars(self).pop("_asked", None)
