"""Constraints on components: advantages mixed by Lagrange multipliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.composers.base import (
    KL,
    Composer,
    Observed,
    by_name,
    named,
    one_of,
    positive,
    tensor,
    weighted,
    whitened,
)
from align.composers.multipliers import Rule
from align.composers.search import ThresholdSearch
from align.deferred import Tensor, no_grad, torch
from align.jsons import Fields, Json

RELATIONS = ("at_least", "equal", "at_most")
MIXES = ("complement", "normalised")
PATIENCE = 10  # updates before a threshold that no completion has reached is remarked on


class Lagrangian(Composer):
    """Advantages of the objective and of the constraints, mixed by multipliers that take a step after the policy's.

    N constraints v_i >= theta_i (at_least), = (equal) or <= (at_most), v_i the mean reward; s = -1 for at_most, else 1.
    A_0 = sum of objective.NAME A_NAME, where the name kl stands for the KL's own stream; all A whitened over the
    optimiser batch. mix complement: (N - sum l) A_0 + sum s_i l_i A_i, the constrained form of Moskovitz et al. 2023,
    arXiv 2310.04373. normalised: (A_0 + sum s_i l_i A_i) / (1 + sum |l|), PPO-Lag of Safe RLHF.
    violation_i = s_i (theta_i - v_i). With `search` thresholds are looked for during the run: align.composers.search.
    """

    target = "advantage"
    apply = "next"

    def __init__(
        self,
        names: Sequence[str],
        *,
        thresholds: Mapping[str, float],
        ranges: Mapping[str, Sequence[float]],
        relation: str,
        objective: Mapping[str, float],
        rule: Rule,
        mix: str,
        whiten: bool,
        epsilon: float,
        search: ThresholdSearch | None,
    ):
        super().__init__(names, smallest=1)
        one_of("relation", relation, RELATIONS)
        one_of("mix", mix, MIXES)
        positive("epsilon", epsilon)
        self.rule, self.mix, self.whiten, self.epsilon, self.search = rule, mix, whiten, epsilon, search
        self.sign = -1.0 if relation == "at_most" else 1.0
        self._check_rule(relation)
        self.objective = by_name(objective, (*self.names, KL), "objective", complete=False)
        if not any(self.objective.values()):
            raise ValueError("composer.objective: nothing is maximised; add composer.objective.kl=1")
        self.needs = self._needs()
        known = by_name(self._first_thresholds(thresholds), self.names, "thresholds", complete=False)
        if not known:
            raise ValueError(f"composer.thresholds: none is given; add composer.thresholds.{self.names[0]}=NUMBER")
        both = [name for name in known if name in self.objective]
        if both:
            raise ValueError(f"composer.objective.{both[0]}: has a threshold already; take one of them out")
        unused = [name for name in self.names if name not in known and name not in self.objective]
        if unused:
            raise ValueError(
                f"composer.thresholds.{unused[0]} is missing: give a threshold, or composer.objective.{unused[0]}=1, "
                f"or reward.{unused[0]}.weight=0 to measure it only"
            )
        self.constrained = tuple(known)
        _check_ranges(known, ranges)
        self._index = [self.names.index(name) for name in self.constrained]
        self._given = list(known.values())
        self._state = rule.start(len(known))
        self._violations: list[float] = []
        self._extremes: list[list[float]] = []  # [2, N], lowest and highest reward of a completion so far
        self._updates = 0
        if search is not None:
            self.gold_metric = search.metric

    def _needs(self) -> frozenset[str]:
        kl = {"kl_stream"} if KL in self.objective else set()
        return frozenset(kl | ({"gold"} if self.search is not None else set()))

    def _check_rule(self, relation: str) -> None:
        if self.mix == "complement" and not self.rule.bounded:
            raise ValueError(
                "composer.mix=complement: the weight of the objective turns negative with multipliers that are not "
                "bounded; use mix=normalised, or rule.squash=sigmoid or tanh"
            )
        if (relation == "equal") != self.rule.signed:
            raise ValueError(
                f"composer.relation={relation}: "
                + (
                    "an equality needs multipliers of both signs; use rule.squash=tanh"
                    if relation == "equal"
                    else "multipliers of both signs are an equality's; use relation=equal or rule.squash=sigmoid"
                )
            )

    def _first_thresholds(self, thresholds: Mapping[str, float]) -> Mapping[str, float]:
        if self.search is None:
            return thresholds
        if thresholds:
            raise ValueError("composer.thresholds: they are searched for; take them out, or use composer.search=null")
        return {name: 0.0 for name in self.search.names}

    @property
    def _thresholds(self) -> list[float]:
        """[N], as they are now."""
        if self.search is None:
            return self._given
        found = dict(zip(self.search.names, self.search.point, strict=True))
        return [found[name] for name in self.constrained]

    @property
    def penalty_signs(self) -> tuple[float, ...]:
        """With a KL stream 0 for the others; without one each stream holds the penalties, so that the mix does too."""
        if "kl_stream" in self.needs:
            return super().penalty_signs
        return tuple(self.sign if name in self.constrained else 1.0 for name in self.names)

    @property
    def thresholds(self) -> dict[str, float]:
        """By name, as they are now."""
        return dict(zip(self.constrained, self._thresholds, strict=True))

    @property
    def weights(self) -> Tensor:
        """Coefficients of the streams [K, or K + 1 with the KL] float64."""
        multipliers = self.rule.multipliers(self._state)
        if self.mix == "complement":
            scale, rest = 1.0, float(len(multipliers) - multipliers.sum())
        else:
            scale = rest = float(1 / (1 + multipliers.abs().sum()))
        signed = dict(zip(self.constrained, (scale * self.sign * multipliers).tolist(), strict=True))
        return tensor([signed.get(name, rest * self.objective.get(name, 0.0)) for name in self.streams])

    @no_grad
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See Composer."""
        streams = self.checked(streams, keep)
        if self.whiten:
            streams = whitened(streams, keep, self.epsilon)
        return weighted(streams, self.weights, keep)

    @property
    def due(self) -> bool:
        """Whether the search has waited long enough at its point."""
        return self.search is not None and self.search.due

    def update(self, observed: Observed) -> None:
        """Reads means, and lowest and highest where given; with a search gold."""
        if observed.means is not None:
            means = self.vector(observed.means, "mean reward")[self._index]
            self._violations = (self.sign * (tensor(self._thresholds) - means)).tolist()
            self._state = self.rule.step(self._state, tensor(self._violations))
            self._updates += 1
            if observed.lowest is not None and observed.highest is not None:
                self._widen(observed.lowest, observed.highest)
            if self.search is not None:
                self.search.waited(dict(zip(self.constrained, means.tolist(), strict=True)))
        if observed.gold is not None and self.search is not None and self.search.due:
            self.search.tell(observed.gold)

    def _widen(self, lowest: Tensor, highest: Tensor) -> None:
        low = self.vector(lowest, "lowest reward")[self._index]
        high = self.vector(highest, "highest reward")[self._index]
        if self._extremes:
            low = torch.minimum(low, tensor(self._extremes[0]))
            high = torch.maximum(high, tensor(self._extremes[1]))
        self._extremes = [low.tolist(), high.tolist()]

    def metrics(self) -> dict[str, float]:
        """multiplier/NAME, threshold/NAME, violation/NAME (> 0: broken) of constraints, weight/NAME of streams."""
        out = named("weight", self.streams, self.weights)
        out |= named("multiplier", self.constrained, self.rule.multipliers(self._state))
        out |= named("threshold", self.constrained, self._thresholds)
        if self._violations:
            out |= named("violation", self.constrained, self._violations)
        return out | (self.search.metrics() if self.search is not None else {})

    def remarks(self) -> list[str]:
        """Thresholds outside all that completions have had so far."""
        if not self._extremes or self._updates < PATIENCE:
            return []
        limits = zip(self.constrained, self._thresholds, *self._extremes, strict=True)
        return [
            f"composer.thresholds.{name}={theta:g}: completions of the first {PATIENCE} steps had rewards from {low:g} "
            f"to {high:g}; it may be out of reach; is it in the unit of reward.{name}?"
            for name, theta, low, high in limits
            if not low <= theta <= high
        ]

    def state_dict(self) -> Json:
        """See Composer."""
        return super().state_dict() | {
            "constrained": list(self.constrained),
            "thresholds": list(self._thresholds),
            "rule": {key: list(values) for key, values in self._state.items()},
            "violations": list(self._violations),
            "extremes": [list(row) for row in self._extremes],
            "updates": self._updates,
            "search": None if self.search is None else self.search.state_dict(),
        }

    def load_state_dict(self, state: Fields) -> None:
        """See Composer. Thresholds of the settings hold, unless they are searched for."""
        super().load_state_dict(state)
        if tuple(state["constrained"]) != self.constrained or state["rule"].keys() != self._state.keys():
            raise ValueError("composer: the checkpoint has other constraints or another rule; use those of the run")
        if (state["search"] is None) != (self.search is None):
            raise ValueError("composer.search: the checkpoint has another; a run keeps its own")
        self._state = {key: list(values) for key, values in state["rule"].items()}
        self._violations = list(state["violations"])
        self._extremes = [list(row) for row in state["extremes"]]
        self._updates = state["updates"]
        if self.search is not None:
            self.search.load_state_dict(state["search"])


def _check_ranges(thresholds: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> None:
    for name, bounds in ranges.items():
        if name not in thresholds:
            raise ValueError(f"composer.ranges.{name}: no such constraint; there are {', '.join(thresholds)}")
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"composer.ranges.{name}={list(bounds)}: must be [low, high] with low below high")
        if not bounds[0] <= thresholds[name] <= bounds[1]:
            raise ValueError(
                f"composer.thresholds.{name}={thresholds[name]:g}: outside composer.ranges.{name}={list(bounds)}, "
                "so it can never be met or never be broken"
            )
