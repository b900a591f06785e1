"""Weights that stay: sums of components, whitened or not; squared distances to targets; confidence; directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align.composers.base import (
    TARGETS,
    Composer,
    Target,
    Vector,
    by_name,
    named,
    one_of,
    positive,
    simplex,
    summing_to_one,
    weighted,
    whitened,
    within,
)
from align.deferred import Tensor, no_grad, torch

NORMALISATIONS = ("none", "whiten")


class Fixed(Composer):
    """sum_i w_i x_i. x: rewards or advantages of each component, whitened over the optimiser batch or as they are.

    Plain sums of rewards, which the constrained form is compared with (Moskovitz et al. 2023, arXiv 2310.04373), and
    the static baselines of dynamic reward weighting (arXiv 2509.11452). A weight may be negative, of a cost.
    """

    weights: Vector = Vector()

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Mapping[str, float] | None,
        normalise: str,
        epsilon: float,
        target: Target,
    ):
        super().__init__(names)
        one_of("normalise", normalise, NORMALISATIONS)
        one_of("target", target, TARGETS)
        positive("epsilon", epsilon)
        self.normalise, self.epsilon, self.target = normalise, epsilon, target
        if weights:  # of either sign, which those on a simplex are not
            self.weights = summing_to_one(list(by_name(weights, self.names, "weights").values()), "weights")
        else:
            self.weights = simplex(weights, self.names, "weights")

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See Composer."""
        streams = self.checked(streams, keep)
        if self.normalise == "whiten":
            streams = whitened(streams, keep, self.epsilon)
        return weighted(streams, self.weights, keep)

    def metrics(self) -> dict[str, float]:
        """weight/NAME."""
        return named("weight", self.names, self.weights)


class Satisficing(Composer):
    """-sum_i (r_i - theta_i)^2 of each completion: PPO-SAT (Moskovitz et al. 2023, arXiv 2310.04373).

    For comparison only: the square of single completions punishes their variance beside the distance of their mean, so
    that a component of 0 and 1 with a threshold below 0.5 is best at 0.
    """

    target = "reward"
    thresholds: Vector = Vector()

    def __init__(self, names: Sequence[str], *, thresholds: Mapping[str, float]):
        super().__init__(names, smallest=1)
        self.thresholds = list(by_name(thresholds, self.names, "thresholds").values())

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See Composer."""
        distances = self.checked(streams, keep) - self.thresholds.to(streams)
        total = -(distances**2).sum(1)
        return total if keep is None else torch.where(keep, total, 0.0)

    def metrics(self) -> dict[str, float]:
        """threshold/NAME."""
        return named("threshold", self.names, self.thresholds)


class Uncertainty(Composer):
    """c sum_i w_i A_i with a confidence c in [0, 1] of each prompt, smaller where its completions disagree.

    context [M]: dispersion of the prompt's completions, >= 0 (`disagreement`, or a standard deviation). c multiplies
    advantages: a factor on all rewards of a prompt is removed by estimators that divide by the prompt's standard
    deviation. After URPA (arXiv 2508.06317), whose abstract alone was read: the form of c, see confidence, is ours.
    """

    needs = frozenset({"uncertainty"})
    target = "advantage"
    weights: Vector = Vector()

    def __init__(self, names: Sequence[str], *, weights: Mapping[str, float] | None, scale: float, floor: float):
        super().__init__(names, smallest=1)
        positive("scale", scale)
        within("floor", floor, 0, math.inf)
        self.scale, self.floor = scale, floor
        self.weights = simplex(weights, self.names, "weights")

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """See Composer."""
        streams = self.checked(streams, keep)
        if context is None or context.shape != streams.shape[:1]:
            raise ValueError(f"composer: one dispersion is needed for each of {len(streams)} rows")
        return confidence(context, self.scale, self.floor).to(streams) * weighted(streams, self.weights, keep)

    def metrics(self) -> dict[str, float]:
        """weight/NAME."""
        return named("weight", self.names, self.weights)


def confidence(dispersion: Tensor, scale: float, floor: float) -> Tensor:
    """exp(-max(dispersion, floor) / scale), in (0, 1]. floor: what agreement alone cannot go below, against a policy
    that confirms itself."""
    return torch.exp(-dispersion.clamp(min=floor) / scale)


def disagreement(answers: Sequence[str | None]) -> tuple[str | None, float]:
    """The commonest of a prompt's answers, the first one of several, and the share of the others. None is no answer:
    it is never the commonest unless there is nothing else, and counts among the others."""
    known = [answer for answer in answers if answer is not None]
    if not known:
        return None, 1.0
    label = max(dict.fromkeys(known), key=known.count)
    return label, 1 - known.count(label) / len(answers)


class Directional(Composer):
    """v . r with a unit vector v of each prompt: directional preference alignment (arXiv 2402.18571).

    context [N, K]: v, which the prompt tells rounded (`direction_weights`); here it is not rounded. Components should
    have the same unit and centre, as what is far from 0 counts in every direction. degrees, message: how prompts get
    directions, for whoever makes prompts; degrees [low, high] of an angle between two components, null: rows have them.
    """

    needs = frozenset({"direction"})
    target = "reward"

    def __init__(self, names: Sequence[str], *, degrees: Sequence[float] | None, message: str):
        super().__init__(names)
        if degrees is not None:
            if len(self.names) != 2:
                raise ValueError(
                    f"composer.degrees={list(degrees)}: an angle is between two components, there are "
                    f"{len(self.names)}; use null and a column direction in the data"
                )
            if len(degrees) != 2 or not -180 <= degrees[0] < degrees[1] <= 180:
                raise ValueError(
                    f"composer.degrees={list(degrees)}: must be [low, high], ascending, between -180 and 180"
                )
            if "{weights}" not in message:
                raise ValueError("composer.message: has no {weights}, so prompts would not tell their direction")
        self.degrees, self.message = degrees, message

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """See Composer."""
        streams = self.checked(streams, keep)
        if context is None or context.shape != streams.shape:
            raise ValueError(f"composer: a direction of {len(self.names)} numbers is needed for each of the rows")
        if not torch.allclose(context.double().norm(dim=1), torch.ones(len(context), dtype=torch.float64)):
            raise ValueError("composer: a direction of a prompt is no unit vector; its squares must sum to 1")
        total = (streams * context.to(streams)).sum(1)
        return total if keep is None else torch.where(keep, total, 0.0)


def direction(degrees: Tensor) -> Tensor:
    """(cos, sin) of angles [P] in degrees [P, 2]: shares of the first and of the second component."""
    radians = torch.deg2rad(degrees.double())
    return torch.stack([radians.cos(), radians.sin()], 1)


def direction_weights(directions: Tensor) -> list[tuple[int, ...]]:
    """What prompts say of directions [P, K]: hundredths, rounded."""
    return [tuple(round(100 * v) for v in row) for row in directions.tolist()]


def drawn_degrees(num: int, low: float, high: float, seed: int) -> Tensor:
    """Angles [num], uniform in [low, high): the suggested range is -45 to 0."""
    if not -180 <= low < high <= 180:
        raise ValueError(f"degrees from {low:g} to {high:g}: must be ascending, between -180 and 180")
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(num, generator=generator, dtype=torch.float64)


def best(rewards: Tensor, directions: Tensor) -> Tensor:
    """Which of n completions [P, n, K] is farthest in its prompt's direction [P], the first of equals; -1 where all
    miss a reward. Rejection-sampling fine-tuning learns from these; a completion that misses a reward is never one."""
    scores = (rewards * directions[:, None, :]).sum(-1)
    known = ~scores.isnan()
    place = torch.where(known, scores, -math.inf).argmax(1)
    return torch.where(known.any(1), place, -1)
