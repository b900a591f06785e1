"""A factor on the learning signal from how far a held-out measurement pushes the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align.composers.base import (
    TARGETS,
    Composer,
    Observed,
    Target,
    Vector,
    by_name,
    named,
    one_of,
    positive,
    simplex,
    weighted,
    within,
)
from align.composers.invariance import refuse_without_effect
from align.deferred import Tensor, no_grad
from align.jsons import Fields, Json

Point = tuple[float, ...]
MAX_OBJECTIVES = 4  # exact volumes by slices take a time that grows with points ** (K - 1)
PATIENCE = 3  # measurements none of which dominates the reference point before it is remarked on


def dominates(point: Sequence[float], other: Sequence[float]) -> bool:
    """Whether point is greater in every objective."""
    return all(a > b for a, b in zip(point, other, strict=True))


def hypervolume(points: Sequence[Point], reference: Sequence[float]) -> float:
    """Volume of what the points dominate and the reference point does not, exactly; objectives are maximised.

    Points that are not greater than the reference in every objective count for nothing (yining610/
    dynamic-reward-weighting@238fe65 gives negative volumes, or an error). By slices along the last objective.
    """
    inside = front([p for p in points if dominates(p, reference)])
    if not inside:
        return 0.0
    if len(reference) == 1:
        return max(p[0] for p in inside) - reference[0]
    ordered = sorted(inside, key=lambda p: -p[-1])
    volume = 0.0
    for i, point in enumerate(ordered):
        below = ordered[i + 1][-1] if i + 1 < len(ordered) else reference[-1]
        if point[-1] > below:
            volume += (point[-1] - below) * hypervolume([p[:-1] for p in ordered[: i + 1]], reference[:-1])
    return volume


def contribution(points: Sequence[Point], point: Point, reference: Sequence[float]) -> float:
    """What the point adds to the volume of the others, >= 0; 0 for one that does not dominate the reference.

    Its own box less what the others cover of it: no difference of two large volumes.
    """
    if not dominates(point, reference):
        return 0.0
    box = math.prod(a - b for a, b in zip(point, reference, strict=True))
    covered = [tuple(min(a, b) for a, b in zip(point, other, strict=True)) for other in points]
    return max(box - hypervolume(covered, reference), 0.0)


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other is at least as great as in every objective; of equal ones the first."""
    kept: list[Point] = []
    for point in points:
        if any(all(a >= b for a, b in zip(other, point, strict=True)) for other in kept):
            continue
        kept = [k for k in kept if not all(a >= b for a, b in zip(point, k, strict=True))] + [point]
    return kept


class Hypervolume(Composer):
    """rho sum_i w_i x_i, rho = lowest + gain tanh(contribution of the last measurement), 1 before the first.

    x: rewards (target reward) or advantages. The reference point is `reference`, or the first measurement, of the
    policy before training. A measurement joins the front if it contributes. Objectives are (p - reference) / span, of
    those in `minimise` the negative: without spans an objective of large numbers saturates the tanh.
    One positive factor on all rewards of a step is removed by estimators that normalise over the prompt's group or the
    batch; target reward is refused with them, unless allow_no_effect.
    Dynamic reward weighting, arXiv 2509.11452, hypervolume-guided; yining610/dynamic-reward-weighting@238fe65.
    """

    needs = frozenset({"validation"})
    apply = "next"
    weights: Vector = Vector()

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Mapping[str, float] | None,
        target: Target,
        allow_no_effect: bool,
        reference: Mapping[str, float] | None,
        spans: Mapping[str, float],
        minimise: Sequence[str],
        lowest: float,
        gain: float,
    ):
        super().__init__(names)
        if len(self.names) > MAX_OBJECTIVES:
            raise ValueError(
                f"composer: {len(self.names)} components; volumes are exact and quick up to {MAX_OBJECTIVES}; "
                "set reward.NAME.weight=0 for those that are measured only"
            )
        one_of("target", target, TARGETS)
        within("lowest", lowest, 0, math.inf)
        positive("gain", gain)
        self.target, self.allow_no_effect, self.lowest, self.gain = target, allow_no_effect, lowest, gain
        self.weights = simplex(weights, self.names, "weights")
        for name in minimise:
            one_of("minimise", name, self.names)
        self._signs = [-1.0 if name in minimise else 1.0 for name in self.names]
        known = by_name(spans, self.names, "spans", complete=False)
        for name, span in known.items():
            positive(f"spans.{name}", span)
        self._spans = [known.get(name, 1.0) for name in self.names]
        self._reference: list[float] | None = None
        if reference:
            self._reference = list(by_name(reference, self.names, "reference").values())
        self._front: list[Point] = []  # normalised, the origin is the reference point
        self._accepted = self._measured = self._outside = 0
        self._factor, self._last = 1.0, 0.0

    def check(self, advantage: object, choice: str, penalties: bool) -> None:
        """See Composer."""
        if self.target == "reward" and not self.allow_no_effect:
            refuse_without_effect(advantage, choice, penalties)

    @property
    def due(self) -> bool:
        """Whether the reference point is to be measured, before the first step."""
        return self._reference is None

    @property
    def factor(self) -> float:
        """rho, of the next step."""
        return self._factor

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See Composer."""
        return self._factor * weighted(self.checked(streams, keep), self.weights, keep)

    def update(self, observed: Observed) -> None:
        """Reads validation."""
        if observed.validation is None:
            return
        values = self.vector(observed.validation, "held-out mean").tolist()
        if self._reference is None:
            self._reference = values
            return
        parts = zip(values, self._reference, self._spans, self._signs, strict=True)
        point = tuple(sign * (value - origin) / span for value, origin, span, sign in parts)
        origin = [0.0] * len(self.names)
        self._measured += 1
        self._outside += not dominates(point, origin)
        self._last = contribution(self._front, point, origin)
        if self._last > 0:
            self._accepted += 1
            self._front = front([*self._front, point])
        self._factor = self.lowest + self.gain * math.tanh(self._last)

    def metrics(self) -> dict[str, float]:
        """pareto/hypervolume, pareto/contribution, pareto/factor, pareto/size (the front), pareto/accepted (with
        points dominated since), weight/NAME: the factor times the weight."""
        out = named("weight", self.names, self._factor * self.weights)
        return out | {
            "pareto/hypervolume": hypervolume(self._front, [0.0] * len(self.names)),
            "pareto/contribution": self._last,
            "pareto/factor": self._factor,
            "pareto/size": float(len(self._front)),
            "pareto/accepted": float(self._accepted),
        }

    def points(self) -> list[dict[str, float]]:
        """The front in the units of the components."""
        origin = self._reference or []
        return [
            {name: origin[i] + self._signs[i] * self._spans[i] * point[i] for i, name in enumerate(self.names)}
            for point in self._front
        ]

    def remarks(self) -> list[str]:
        """A reference point that nothing dominates."""
        if self._outside == self._measured >= PATIENCE:
            assert self._reference is not None
            said = ", ".join(f"{n} {v:g}" for n, v in zip(self.names, self._reference, strict=True))
            return [
                f"composer.reference ({said}): none of the first {PATIENCE} measurements is better in every component, "
                f"so the factor stays at {self.lowest:g}; give a lower composer.reference, or name components that "
                "should shrink in composer.minimise"
            ]
        return []

    def state_dict(self) -> Json:
        """See Composer."""
        return super().state_dict() | {
            "reference": None if self._reference is None else list(self._reference),
            "front": [list(p) for p in self._front],
            "counts": [self._accepted, self._measured, self._outside],
            "factor": self._factor,
            "last": self._last,
        }

    def load_state_dict(self, state: Fields) -> None:
        """See Composer."""
        super().load_state_dict(state)
        self._reference = None if state["reference"] is None else list(state["reference"])
        self._front = [tuple(p) for p in state["front"]]
        self._accepted, self._measured, self._outside = state["counts"]
        self._factor, self._last = state["factor"], state["last"]
