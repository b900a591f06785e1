"""How much the gradient of each objective helps all of them, measured on the completions of a step.

exact: K backward passes over one graph, all inner products. directional: one backward pass and two forward passes,
whatever K is, for the products with the sum of the gradients alone; by itself, or as the hook of the update's own step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from align.composers.base import Composer
from align.composers.gradient import cosines, influences
from align.engine.base import Engine
from align.engine.measuring import MeasuringEngine
from align.trainers.experience import with_columns
from align.trainers.loop import Cotangents, ForwardPass, NonFinite, StepHook, TrainContext, forward_passes, token_values
from align.types import Estimate, Example

# Of the difference, by the run's precision: how far it moves log-probs, nats, at least. Less drowns in rounding, more
# in the curvature: tests/bench/influence.py
STEPS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
CHUNK = 1 << 20  # numbers that are multiplied at once in float64
PREFIX = "advantages_"


@dataclass(frozen=True)
class Influences:
    """What was measured. influences [K] float64."""

    influences: Tensor
    metrics: dict[str, float]


def chosen_parameters(parameters: Mapping[str, Tensor], pattern: str | None) -> dict[str, Tensor]:
    """The trained weights whose names hold the pattern; None: all. Raises ValueError if there are none."""
    found = {n: p for n, p in parameters.items() if pattern is None or re.search(pattern, n)}
    if not found:
        some = ", ".join(list(parameters)[:3])
        raise ValueError(f"composer.parameters={pattern}: matches no trained weight; there are {some}, ...")
    return found


def with_advantages(examples: Sequence[Example], advantages: np.ndarray) -> list[Example]:
    """The examples whose rows carry the columns PREFIX + k of advantages [C, K]."""
    rows = [row for e in examples for row in e.rows]
    borders = np.cumsum([int(row.targets.sum()) for row in rows])[:-1]
    pieces = np.split(advantages.astype(np.float32), borders)
    filled = iter(
        replace(row, columns={**row.columns, **{f"{PREFIX}{k}": piece[:, k] for k in range(advantages.shape[1])}})
        for row, piece in zip(rows, pieces, strict=True)
    )
    return [replace(e, rows=tuple(next(filled) for _ in e.rows)) for e in examples]


def measure(
    context: TrainContext,
    examples: Sequence[Example],
    advantages: Tensor,
    how: str,
    max_norm: float | None,
    pattern: str | None,
    check: Callable[[], None] = lambda: None,
    names: Sequence[str] = (),
) -> Influences:
    """I_k = <g_k, sum_j g_j> over the weights of the pattern, g_k the gradient of the step's loss with advantages
    [C, K] of objective k alone. how: exact or directional; exact needs whole weights.

    max_norm, exact only: g_k is first scaled down to this norm, over all trained weights. Metrics of exact: the norms
    gradient/norm_NAME and the cosines gradient/cos_A_B. Nothing changes: weights and gradients are as before. Every
    process of the run calls it and gets the same. Raises NonFinite.
    """
    if how == "directional":
        found = Directional(context, examples, advantages, pattern, check)
        for forward in forward_passes(context, found.examples, check, train_mode=True):
            found.add(forward)
        found.gathered()
        return Influences(found.influences, {})
    trained = context.engine.parameters
    chosen = chosen_parameters(trained, pattern)
    parts = with_advantages(examples, advantages.cpu().numpy())
    gram, norms = _gram(context, parts, advantages.shape[1], chosen, chosen if max_norm is None else trained, check)
    metrics = {f"gradient/norm_{name}": float(norms[k]) for k, name in enumerate(names)}
    angles = cosines(gram)
    for i, first in enumerate(names):
        metrics |= {f"gradient/cos_{first}_{names[j]}": float(angles[i, j]) for j in range(i + 1, len(names))}
    return Influences(_finite(influences(gram, norms, max_norm), examples), metrics)


def _finite(values: Tensor, examples: Sequence[Example]) -> Tensor:
    """The influences. Raises NonFinite if one is no number: a composer would blame the rewards."""
    if not bool(values.isfinite().all()):
        rows = ", ".join(e.source for e in examples[:8])
        raise NonFinite(f"the objectives' influences are no numbers; the batch holds {rows}")
    return values


def _gram(
    context: TrainContext,
    examples: Sequence[Example],
    num: int,
    chosen: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Inner products [K, K] over the chosen weights, and norms [K] over all that are wanted; float64 on the CPU."""
    engine = measuring(context.engine)
    gradients = engine.gradients(list(wanted), num)
    cotangents = Cotangents(context, examples, _columns(num))
    for forward in forward_passes(context, examples, check, train_mode=False):
        gradients.add(forward.policy.token_logps, cotangents(forward).unbind(1), forward.own)
    totals = gradients.total()
    everything = products(engine, totals, list(wanted))
    inside = everything if chosen.keys() == wanted.keys() else products(engine, totals, list(chosen))
    return inside, everything.diagonal().sqrt()


def measuring(engine: Engine) -> MeasuringEngine:
    assert isinstance(engine, MeasuringEngine)
    return engine


def products(engine: Engine, totals: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Tensor:
    """Inner products [K, K] of gradients by the weights of these names, in float64: long sums in float32 are wrong by a
    percent. Each process multiplies its share."""
    world, out = engine.world, torch.zeros(len(totals), len(totals), dtype=torch.float64)
    for name in names:
        if name not in totals[0]:
            continue
        rows = [total[name].flatten() for total in totals]
        first, last = (len(rows[0]) * rank // world.size for rank in (world.rank, world.rank + 1))
        if engine.sharded:
            first, last = 0, len(rows[0])
        for start in range(first, last, CHUNK):
            block = torch.stack([row[start : min(start + CHUNK, last)] for row in rows]).double()
            out += (block @ block.T).cpu()
    return torch.tensor(world.sum(out.flatten().tolist()), dtype=torch.float64).view_as(out)


class Directional(StepHook):
    """<g_k, g> of the objectives whose advantages [C, K] are given, g = sum_j g_j: sum over tokens of dL_k/dlogp times
    the derivative of logp along g, which is a central difference.

    It is the hook of a step over `examples`, or is given its forward passes; then influences [K] float64 is there. The
    length of the difference: along g the loss sum_j L_j changes by length |g|^2, to which log-probs that all move by
    the number of STEPS would add up.
    """

    def __init__(
        self,
        context: TrainContext,
        examples: Sequence[Example],
        advantages: Tensor,
        pattern: str | None,
        check: Callable[[], None] = lambda: None,
    ):
        num = advantages.shape[1]
        self.examples = with_advantages(examples, advantages.cpu().numpy())
        self.influences = torch.zeros(num, dtype=torch.float64)
        self._context, self._check = context, check
        self._engine = measuring(context.engine)
        self._names = list(chosen_parameters(self._engine.parameters, pattern))
        self._gradients = self._engine.gradients(self._names, 1)
        self._cotangents = Cotangents(context, self.examples, _columns(num))
        self._slopes: dict[int, np.ndarray] = {}  # of this process's examples: dL_k/dlogp [their C, K]

    def backward(self, forward: ForwardPass, loss: Tensor, last: bool) -> None:
        """See StepHook."""
        self._engine.backward(loss, last, keep_graph=True)
        self.add(forward)

    def add(self, forward: ForwardPass) -> None:
        """Its share of the gradient and of the derivatives by log-probs; its graph is used up."""
        found = self._cotangents(forward)
        self._gradients.add(forward.policy.token_logps, [found.sum(1)], forward.own)
        if forward.own:
            rows = (self.examples[i].rows for i in forward.part)
            borders = np.cumsum([sum(int(row.targets.sum()) for row in own) for own in rows])[:-1]
            self._slopes |= dict(zip(forward.part, np.split(found.double().cpu().numpy(), borders), strict=True))

    def gathered(self) -> None:
        """See StepHook. Raises NonFinite."""
        engine = self._engine
        totals = self._gradients.total()
        square = float(products(engine, totals, self._names))
        if square == 0:
            return
        (size,) = engine.world.sum([sum(float(np.abs(s.sum(1)).sum()) for s in self._slopes.values())])
        derivative = self._difference(totals[0], STEPS[engine.precision] * size / square)
        own = np.zeros((2, len(self.influences)))
        for i, slopes in self._slopes.items():
            own += np.stack([derivative[i] @ slopes, slopes.sum(1) @ slopes])
        of_gradients, overlaps = np.array(engine.world.sum(own.ravel().tolist())).reshape(own.shape)
        # the sum over k is |g|^2: the least change of the derivatives by which it is
        found = torch.from_numpy(of_gradients + (square - of_gradients.sum()) / overlaps.sum() * overlaps)
        self.influences = _finite(found, self.examples)

    @torch.no_grad()
    def _difference(self, along: Mapping[str, Tensor], length: float) -> list[np.ndarray]:
        """(logp(w + length g) - logp(w - length g)) / 2 length of each example's tokens [its C]."""
        context, engine = self._context, self._engine
        engine.policy.eval()
        found = []
        with engine.moving(along) as move:
            for sign in (1.0, -1.0):
                move(sign * length)
                values = token_values(
                    lambda batch: engine.forward(batch, frozenset()),
                    self.examples,
                    context.layout,
                    context.max_tokens,
                    engine.policy.device,
                    check=self._check,
                    world=engine.world,
                )["token_logps"]
                found.append([np.concatenate([row.astype(np.float64) for row in rows]) for rows in values])
        return [(above - below) / (2 * length) for above, below in zip(*found, strict=True)]


class Measurements:
    """When an online step's influences are measured: by passes of their own before the update, or, of an update of one
    step, by its own passes. beside: whether those serve for it."""

    def __init__(self, context: TrainContext, composer: Composer, beside: bool, check: Callable[[], None]):
        self.context = context
        self.composer = composer
        self.beside = beside and composer.apply == "next" and composer.measure == "directional"
        self.check = check
        self._objectives: Tensor | None = None  # whose advantages [C, K] the coming update measures
        self._hook: Directional | None = None  # of the update that was last

    def before(
        self,
        examples: list[Example],
        columns: dict[str, Sequence[np.ndarray]],
        streams: Tensor,
        others: dict[str, Tensor],
    ) -> Influences | None:
        """Of objectives with the advantages `streams` [C, K]; None where the update measures. columns, others: what the
        objective reads beside them."""
        if self.beside:
            self._objectives = streams
            return None
        prepared = with_columns(examples, Estimate(others), columns)  # a value head's loss reads returns
        c = self.composer
        return measure(self.context, prepared, streams, c.measure, c.max_norm, c.parameters, self.check, names=c.names)

    def hook(self, examples: list[Example]) -> Directional | None:
        """What the update over these examples takes to measure what `before` has left to it."""
        objectives, self._objectives = self._objectives, None
        if objectives is not None:
            self._hook = Directional(self.context, examples, objectives, self.composer.parameters, self.check)
        return self._hook

    def measured(self) -> Tensor | None:
        """The influences [K] that the update has measured, once."""
        hook, self._hook = self._hook, None
        return None if hook is None else hook.influences


def _columns(num: int) -> list[str]:
    return [f"{PREFIX}{k}" for k in range(num)]
