"""Lagrange multipliers of N constraints: rules by which they move. Pure: what changes is the state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from align.composers.base import count, one_of, positive, tensor, within
from align.deferred import Tensor, torch

SQUASHES = ("sigmoid", "tanh", "softplus", "none")
NORM_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_

State = dict[str, list[float]]


class Rule(Protocol):
    """How N multipliers move."""

    bounded: bool  # whether multipliers stay below 1
    signed: bool  # whether they may be negative

    def start(self, num: int) -> State:
        """Before the first step."""
        ...

    def multipliers(self, state: State) -> Tensor:
        """[N] float64."""
        ...

    def step(self, state: State, violations: Tensor) -> State:
        """After an optimiser step. violations [N]: positive where a constraint is broken."""
        ...


@dataclass(frozen=True)
class GradientMultipliers:
    """z <- SGD step on sum_i -f(z_i) violation_i, multiplier f(z): Moskovitz et al. 2023, arXiv 2310.04373.

    squash f: sigmoid (mu, inequality), tanh (xi, equality, in (-1, 1)), softplus (unbounded), none (z itself, kept at
    or above 0). Gradients f'(z_i) violation_i are scaled together to max_grad_norm, then averaged
    with momentum (torch.optim.SGD without dampening). lr 0 keeps the multipliers where they start.
    """

    squash: str
    lr: float
    momentum: float
    max_grad_norm: float
    initial: float

    def __post_init__(self) -> None:
        one_of("rule.squash", self.squash, SQUASHES)
        within("rule.lr", self.lr, 0, math.inf)
        within("rule.momentum", self.momentum, 0, 1)
        positive("rule.max_grad_norm", self.max_grad_norm)
        if not math.isfinite(self.initial) or (self.squash == "none" and self.initial < 0):
            raise ValueError(f"composer.rule.initial={self.initial}: must be finite, and at least 0 for squash=none")

    @property
    def bounded(self) -> bool:
        """See Rule."""
        return self.squash in ("sigmoid", "tanh")

    @property
    def signed(self) -> bool:
        """See Rule."""
        return self.squash == "tanh"

    def start(self, num: int) -> State:
        """See Rule."""
        return {"raw": [float(self.initial)] * num, "momentum": [0.0] * num}

    def multipliers(self, state: State) -> Tensor:
        """See Rule."""
        raw = tensor(state["raw"])
        if self.squash == "sigmoid":
            return raw.sigmoid()
        if self.squash == "tanh":
            return raw.tanh()
        return torch.nn.functional.softplus(raw) if self.squash == "softplus" else raw

    def step(self, state: State, violations: Tensor) -> State:
        """See Rule."""
        raw = tensor(state["raw"])
        gradient = -self._slope(raw) * violations
        gradient = gradient * (self.max_grad_norm / (gradient.norm() + NORM_EPSILON)).clamp(max=1.0)
        momentum = self.momentum * tensor(state["momentum"]) + gradient
        raw = raw - self.lr * momentum
        if self.squash == "none":
            raw = raw.clamp(min=0.0)
        return {"raw": raw.tolist(), "momentum": momentum.tolist()}

    def _slope(self, raw: Tensor) -> Tensor:
        if self.squash == "sigmoid":
            return raw.sigmoid() * (1 - raw.sigmoid())
        if self.squash == "tanh":
            return 1 - raw.tanh() ** 2
        return raw.sigmoid() if self.squash == "softplus" else torch.ones_like(raw)


@dataclass(frozen=True)
class LogMultipliers:
    """z <- min(z + lr v e^z, log largest), multiplier e^z: PPO-Lag of Safe RLHF (Dai et al. 2023, arXiv 2310.12773).

    v: mean of the violations of the last `window` updates. The first `delay` updates only fill the window.
    """

    initial: float
    largest: float
    lr: float
    window: int
    delay: int

    bounded = False
    signed = False

    def __post_init__(self) -> None:
        positive("rule.initial", self.initial)
        positive("rule.largest", self.largest)
        within("rule.lr", self.lr, 0, math.inf)
        count("rule.window", self.window)
        within("rule.delay", self.delay, 0, math.inf)
        if self.initial > self.largest:
            raise ValueError(f"composer.rule.initial={self.initial:g}: must be at most rule.largest={self.largest:g}")

    def start(self, num: int) -> State:
        """See Rule."""
        return {"log": [math.log(self.initial)] * num, "seen": [], "updates": [0.0]}

    def multipliers(self, state: State) -> Tensor:
        """See Rule."""
        return tensor(state["log"]).exp()

    def step(self, state: State, violations: Tensor) -> State:
        """See Rule."""
        num = len(state["log"])
        seen = [*state["seen"], *violations.tolist()][-self.window * num :]
        log, updates = tensor(state["log"]), state["updates"][0] + 1
        if updates > self.delay:
            mean = tensor(seen).reshape(-1, num).mean(0)
            log = (log + self.lr * mean * log.exp()).clamp(max=math.log(self.largest))
        return {"log": log.tolist(), "seen": seen, "updates": [updates]}


@dataclass(frozen=True)
class PIDMultipliers:
    """max(0, P v + I sum v + D max(0, v - last v)), the sum kept at or above 0: Stooke et al. 2020, arXiv 2007.03964,
    algorithm 2. Multipliers start at `initial`, which the integral carries; > 0 needs integral > 0."""

    proportional: float
    integral: float
    derivative: float
    initial: float

    bounded = False
    signed = False

    def __post_init__(self) -> None:
        for key in ("proportional", "integral", "derivative", "initial"):
            within(f"rule.{key}", getattr(self, key), 0, math.inf)
        if self.proportional == self.integral == self.derivative == 0:
            raise ValueError("composer.rule: proportional, integral and derivative are all 0, multipliers cannot move")
        if self.initial > 0 and self.integral == 0:
            raise ValueError(f"composer.rule.initial={self.initial:g} has no effect with rule.integral=0")

    def start(self, num: int) -> State:
        """See Rule."""
        total = self.initial / self.integral if self.integral > 0 else 0.0
        return {"sum": [total] * num, "last": [], "value": [float(self.initial)] * num}

    def multipliers(self, state: State) -> Tensor:
        """See Rule."""
        return tensor(state["value"])

    def step(self, state: State, violations: Tensor) -> State:
        """See Rule."""
        total = (tensor(state["sum"]) + violations).clamp(min=0.0)
        rise = (violations - tensor(state["last"])).clamp(min=0.0) if state["last"] else torch.zeros_like(violations)
        value = self.proportional * violations + self.integral * total + self.derivative * rise
        return {"sum": total.tolist(), "last": violations.tolist(), "value": value.clamp(min=0.0).tolist()}
