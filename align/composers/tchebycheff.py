"""Weights that pull up the component with the largest weighted gap to its ideal: Tchebycheff scalarisation."""

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
    tensor,
    weighted,
    within,
)
from align.deferred import Tensor, no_grad, torch
from align.jsons import Fields, Json

FORMS = ("plain", "smooth", "mirror")


def gaps(weights: Tensor, values: Tensor, ideal: Tensor) -> Tensor:
    """w_i (z_i - v_i) of maximised values v [..., K] with ideal z."""
    return weights * (ideal - values)


def tchebycheff(weights: Tensor, values: Tensor, ideal: Tensor) -> Tensor:
    """max_i w_i (z_i - v_i), to be minimised."""
    return gaps(weights, values, ideal).amax(-1)


def smooth_tchebycheff(weights: Tensor, values: Tensor, ideal: Tensor, mu: float) -> Tensor:
    """mu log sum_i exp(w_i (z_i - v_i) / mu): between the plain form and that plus mu log K.

    Lin et al. 2024, arXiv 2402.19078. Its gradient with respect to v_i is -w_i softmax(w (z - v) / mu)_i.
    """
    return mu * torch.logsumexp(gaps(weights, values, ideal) / mu, -1)


def raised(ideal: Tensor, values: Tensor) -> Tensor:
    """The best so far of each component."""
    return torch.maximum(ideal, values)


class Tchebycheff(Composer):
    """sum_i l_i w_i x_i, l on the simplex from the gaps w_i (z_i - v_i): the objective's gradient in the values v.

    v: means of rewards, averaged with `decay` over updates: the maximum is of expectations, not of single completions.
    z: given, or the best v so far plus tau. form plain: l is 1 at the largest gap (arXiv 2407.17466). smooth: l =
    softmax(gaps / mu) (arXiv 2402.19078). mirror: l <- l exp(eta gap), normalised, the inner maximum of the min-max-max
    view by steps. Before the first update l is uniform. Rewards should have one unit: z enters the gaps.
    """

    apply = "now"
    preference: Vector = Vector()
    _shares: Vector = Vector()

    def __init__(
        self,
        names: Sequence[str],
        *,
        weights: Mapping[str, float] | None,
        target: Target,
        form: str,
        mu: float | None,
        eta: float | None,
        ideal: Mapping[str, float] | None,
        tau: float,
        decay: float,
    ):
        super().__init__(names)
        one_of("target", target, TARGETS)
        one_of("form", form, FORMS)
        for key, value, of in (("mu", mu, "smooth"), ("eta", eta, "mirror")):
            if (value is not None) != (form == of):
                raise ValueError(f"composer.{key}={value}: form={of} needs it, and no other reads it")
            if value is not None:
                positive(key, value)
        within("tau", tau, 0, math.inf)
        within("decay", decay, 0, 1)
        if decay == 1:
            raise ValueError("composer.decay=1: values would never move; use a number below 1")
        self.target, self.form, self.mu, self.eta, self.tau, self.decay = target, form, mu, eta, tau, decay
        self.preference = simplex(weights, self.names, "weights", zeros=False)  # 0: weakly optimal points
        self._given = list(by_name(ideal, self.names, "ideal").values()) if ideal else None
        self._best: Tensor | None = None
        self._values: Tensor | None = None
        self._shares = [1 / len(self.names)] * len(self.names)

    @property
    def ideal(self) -> Tensor | None:
        """z [K]; None before the first update."""
        if self._given is not None:
            return tensor(self._given)
        return None if self._best is None else self._best + self.tau

    @property
    def weights(self) -> Tensor:
        """l_i w_i [K]."""
        return self._shares * self.preference

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See Composer."""
        return weighted(self.checked(streams, keep), self.weights, keep)

    def update(self, observed: Observed) -> None:
        """Reads means."""
        if observed.means is None:
            return
        means = self.vector(observed.means, "mean reward")
        self._values = means if self._values is None else self.decay * self._values + (1 - self.decay) * means
        self._best = self._values if self._best is None else raised(self._best, self._values)
        assert self.ideal is not None
        found = gaps(self.preference, self._values, self.ideal)
        if self.form == "plain":
            self._shares = torch.zeros_like(found)
            self._shares[found.argmax()] = 1.0
        elif self.mu is not None:  # form=smooth
            self._shares = torch.softmax(found / self.mu, 0)
        elif self.eta is not None:  # form=mirror
            # a share that has underflowed to 0 would stay there
            self._shares = torch.softmax(self._shares.clamp(min=1e-300).log() + self.eta * found, 0)

    def metrics(self) -> dict[str, float]:
        """weight/NAME: the share of l_i w_i. multiplier/NAME: l_i. tchebycheff/gap_NAME, /ideal_NAME, /largest_gap."""
        out = named("weight", self.names, self.weights / self.weights.sum())
        out |= named("multiplier", self.names, self._shares)
        if self._values is not None and self.ideal is not None:
            found = gaps(self.preference, self._values, self.ideal)
            out |= named("tchebycheff", [f"gap_{n}" for n in self.names], found)
            out |= named("tchebycheff", [f"ideal_{n}" for n in self.names], self.ideal)
            out["tchebycheff/largest_gap"] = float(found.max())
        return out

    def remarks(self) -> list[str]:
        """Given ideals that the policy has passed: their gaps pull it down no more than they pull others up."""
        if self._given is None or self._best is None:
            return []
        passed = [n for n, b, z in zip(self.names, self._best, self._given, strict=True) if b > z]
        return [
            f"composer.ideal.{n}: the mean reward has passed it; an ideal is a best value that is not reached"
            for n in passed
        ]

    def state_dict(self) -> Json:
        """See Composer."""
        return super().state_dict() | {
            "values": None if self._values is None else self._values.tolist(),
            "best": None if self._best is None else self._best.tolist(),
            "shares": self._shares.tolist(),
        }

    def load_state_dict(self, state: Fields) -> None:
        """See Composer."""
        super().load_state_dict(state)
        self._values = None if state["values"] is None else tensor(state["values"])
        self._best = None if state["best"] is None else tensor(state["best"])
        self._shares = tensor(state["shares"])
