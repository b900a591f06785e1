"""Weights that follow how much each objective's gradient helps all of them: a mirror step from inner products.

The inner products are the engine's. Here: what they are of, what is made of them, and the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align.composers.base import (
    MOMENTS,
    TARGETS,
    Apply,
    Composer,
    Measure,
    Observed,
    Target,
    Vector,
    count,
    named,
    one_of,
    positive,
    simplex,
    tensor,
    weighted,
)
from align.deferred import Tensor, no_grad, torch
from align.jsons import Fields, Json

MEASURES = ("exact", "directional")
NORM_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


def influences(gram: Tensor, norms: Tensor | None, max_norm: float | None) -> Tensor:
    """I_i = <g_i, sum_k g_k> [K], its own term included, of gradients each scaled down to max_norm.

    gram [K, K]: inner products of the gradients over the chosen parameters, summed over micro-batches and processes
    before they are multiplied. norms [K]: of the gradients over all parameters, by which they are clipped; None: the
    roots of the diagonal.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"composer: a Gram matrix of shape {list(gram.shape)}; [K, K] is needed")
    gram = gram.detach().double().cpu()
    if max_norm is None:
        return gram.sum(1)
    lengths = gram.diagonal().sqrt() if norms is None else norms.detach().double().cpu()
    scales = (max_norm / (lengths + NORM_EPSILON)).clamp(max=1.0)
    return (scales[:, None] * gram * scales).sum(1)


def cosines(gram: Tensor) -> Tensor:
    """cos of the angles between the gradients [K, K]; 0 with a gradient of 0."""
    lengths = gram.diagonal().sqrt()
    product = lengths[:, None] * lengths
    return torch.where(product > 0, gram / product.clamp(min=1e-300), torch.zeros_like(gram))


def mirror_step(weights: Tensor, influence: Tensor, rate: float) -> Tensor:
    """softmax(log w + rate I) [K]: the exponentiated step on the simplex."""
    return torch.softmax(weights.log() + rate * influence, 0)


def bounded(weights: Tensor, low: float, high: float) -> Tensor:
    """The weights [K] within [low, high], sum 1, the others in their proportions (K low <= 1 <= K high)."""
    fixed = torch.full_like(weights, math.nan)
    for _ in range(len(weights)):
        free = fixed.isnan()
        rest = 1 - fixed[~free].sum()
        scaled = torch.where(free, weights * rest / weights[free].sum(), fixed)
        over, under = free & (scaled > high), free & (scaled < low)
        if not bool((over | under).any()):
            return scaled
        # only those on the side that gives or takes more: the others may come back within their bounds
        excess = float((scaled - high)[over].sum() - (low - scaled)[under].sum())
        if excess >= 0:
            fixed[over] = high
        if excess <= 0:
            fixed[under] = low
        if not bool(fixed.isnan().any()):
            break
    return fixed


class Gradient(Composer):
    """sum_i w_i x_i, w <- softmax(log w + learning rate / mu * mean influence), every `accumulate` updates.

    Influence I_i = <g_i, sum_k g_k> with g_i the gradient of the loss with component i's advantages alone. apply now:
    the new weights compose the batch that moved them (the authors' code); next: the one after it.
    measure, max_norm, parameters (a pattern of names; null: all) are read by whoever measures gradients.
    Dynamic reward weighting, arXiv 2509.11452, gradient-based; yining610/dynamic-reward-weighting@238fe65.
    """

    needs = frozenset({"influence"})
    weights: Vector = Vector()
    _sum: Vector = Vector()

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Mapping[str, float] | None,
        target: Target,
        apply: Apply,
        measure: Measure,
        mu: float,
        accumulate: int,
        min_weight: float | None,
        max_weight: float | None,
        max_norm: float | None,
        parameters: str | None,
    ):
        super().__init__(names)
        one_of("target", target, TARGETS)
        one_of("apply", apply, MOMENTS)
        one_of("measure", measure, MEASURES)
        positive("mu", mu)
        count("accumulate", accumulate)
        if max_norm is not None:
            positive("max_norm", max_norm)
            if measure != "exact":
                raise ValueError(
                    f"composer.max_norm={max_norm:g}: measure={measure} knows no norm of a gradient; use "
                    "composer.max_norm=null, or composer.measure=exact"
                )
        self.low, self.high = min_weight or 0.0, 1.0 if max_weight is None else max_weight
        if not 0 <= self.low * len(self.names) <= 1 <= self.high * len(self.names) or not self.high <= 1:
            raise ValueError(
                f"composer.min_weight={self.low:g}, max_weight={self.high:g}: {len(self.names)} weights within them "
                "cannot sum to 1"
            )
        self.target, self.apply, self.mu, self.accumulate = target, apply, mu, accumulate
        self.measure, self.max_norm, self.parameters = measure, max_norm, parameters
        self.weights = started = simplex(weights, self.names, "weights", zeros=False)  # a weight of 0 could never grow
        if not all(self.low <= weight <= self.high for weight in started):
            raise ValueError(f"composer.weights: must lie in [{self.low:g}, {self.high:g}], see min_weight, max_weight")
        self._sum = [0.0] * len(self.names)
        self._summed = 0
        self._last: list[float] = []

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See Composer."""
        return weighted(self.checked(streams, keep), self.weights, keep)

    def update(self, observed: Observed) -> None:
        """Reads influences with learning_rate."""
        if observed.influences is None:
            return
        if observed.learning_rate is None:
            raise ValueError("composer: influences without the learning rate of the step")
        influence = self.vector(observed.influences, "influence")
        self._last = influence.tolist()
        self._sum, self._summed = self._sum + influence, self._summed + 1
        if self._summed == self.accumulate:
            rate = observed.learning_rate / self.mu
            moved = mirror_step(self.weights, self._sum / self._summed, rate)
            self.weights = bounded(moved, self.low, self.high) if self.low > 0 or self.high < 1 else moved
            self._sum, self._summed = torch.zeros_like(self._sum), 0

    def metrics(self) -> dict[str, float]:
        """weight/NAME; influence/NAME of the last update."""
        out = named("weight", self.names, self.weights)
        return out | (named("influence", self.names, self._last) if self._last else {})

    def remarks(self) -> list[str]:
        """A weight that has all but vanished, from which a mirror step hardly comes back."""
        # below this a weight takes hundreds of steps of 0.1 K to return
        lost = [name for name, w in zip(self.names, self.weights.tolist(), strict=True) if w < 1e-6]
        if not lost:
            return []
        return [f"composer: the weight of {', '.join(lost)} has fallen below 1e-6; set composer.min_weight to keep it"]

    def state_dict(self) -> Json:
        """See Composer."""
        return super().state_dict() | {
            "weights": self.weights.tolist(),
            "sum": self._sum.tolist(),
            "summed": self._summed,
            "last": list(self._last),
        }

    def load_state_dict(self, state: Fields) -> None:
        """See Composer."""
        super().load_state_dict(state)
        self.weights, self._sum = tensor(state["weights"]), tensor(state["sum"])
        self._summed, self._last = state["summed"], list(state["last"])
