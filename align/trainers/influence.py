"""How much the gradient of each objective helps all of them, measured on the completions of a step.

exact: K backward passes over one graph, all inner products. directional: one backward pass and two forward passes,
whatever K is, for the products with the sum of the gradients alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from align.composers.gradient import cosines, influences
from align.trainers.loop import Trainee, cotangents, token_values
from align.types import Example

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
    trainee: Trainee,
    examples: Sequence[Example],
    advantages: Tensor,
    how: str,
    max_norm: float | None,
    pattern: str | None,
    check: Callable[[], None] = lambda: None,
    names: Sequence[str] = (),
) -> Influences:
    """I_k = <g_k, sum_j g_j> over the weights of the pattern, g_k the gradient of the step's loss with advantages
    [C, K] of objective k alone. how: exact or directional.

    max_norm, exact only: g_k is first scaled down to this norm, over all trained weights. Metrics of exact: the norms
    gradient/norm_NAME and the cosines gradient/cos_A_B. Nothing changes: weights and gradients are as before.
    """
    parts = with_advantages(examples, advantages.cpu().numpy())
    num = advantages.shape[1]
    trained = dict(trainee.engine.parameters)
    chosen = chosen_parameters(trained, pattern)
    if how == "directional":
        return Influences(_directional(trainee, parts, num, chosen, check), {})
    gram, norms = _gram(trainee, parts, num, chosen, trained if max_norm is not None else chosen, check)
    metrics = {f"gradient/norm_{name}": float(norms[k]) for k, name in enumerate(names)}
    angles = cosines(gram)
    for i, first in enumerate(names):
        metrics |= {f"gradient/cos_{first}_{names[j]}": float(angles[i, j]) for j in range(i + 1, len(names))}
    return Influences(influences(gram, norms, max_norm), metrics)


def _gram(
    trainee: Trainee,
    examples: Sequence[Example],
    num: int,
    chosen: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Inner products [K, K] over the chosen weights, and norms [K] over all that are wanted; float64 on the CPU."""
    weights = list(wanted.values())
    sums: list[list[Tensor | None]] = [[None] * len(weights) for _ in range(num)]
    for _, policy, found in cotangents(trainee, examples, [f"{PREFIX}{k}" for k in range(num)], check):
        if not len(policy.token_logps):
            continue
        for k, cotangent in enumerate(found):
            gradients = torch.autograd.grad(
                policy.token_logps, weights, cotangent, retain_graph=k + 1 < num, allow_unused=True
            )
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    before = sums[k][i]
                    sums[k][i] = gradient if before is None else before.add_(gradient)
    gram = torch.zeros(num, num, dtype=torch.float64)
    squares = torch.zeros(num, dtype=torch.float64)
    for i, name in enumerate(wanted):
        rows = [sums[k][i] for k in range(num)]
        if any(row is None for row in rows):
            continue
        products = _products([row.flatten() for row in rows if row is not None])
        squares += products.diagonal()
        if name in chosen:
            gram += products
    return gram, squares.sqrt()


def _products(rows: Sequence[Tensor]) -> Tensor:
    """Inner products [K, K] of long vectors, in float64: long sums in float32 are wrong by a percent."""
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, len(rows[0]), CHUNK):
        block = torch.stack([row[start : start + CHUNK] for row in rows]).double()
        out += (block @ block.T).cpu()
    return out


def _directional(
    trainee: Trainee, examples: Sequence[Example], num: int, chosen: Mapping[str, Tensor], check: Callable[[], None]
) -> Tensor:
    """<g_k, g> [K] float64: sum over tokens of dL_k/dlogp times the derivative of logp along g = sum_j g_j, which is a
    central difference.

    Its step: along g the loss sum_j L_j changes by step |g|^2, to which log-probs that all move by the number of STEPS
    would add up.
    """
    weights = list(chosen.values())
    total: list[Tensor | None] = [None] * len(weights)
    slopes: dict[int, np.ndarray] = {}
    for part, policy, found in cotangents(trainee, examples, [f"{PREFIX}{k}" for k in range(num)], check):
        stacked = torch.stack(found, 1)  # [C, K]
        borders = np.cumsum([sum(int(row.targets.sum()) for row in examples[i].rows) for i in part])[:-1]
        slopes |= dict(zip(part, np.split(stacked.double().cpu().numpy(), borders), strict=True))
        if not len(policy.token_logps):
            continue
        gradients = torch.autograd.grad(policy.token_logps, weights, stacked.sum(1), allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                before = total[i]
                total[i] = gradient if before is None else before.add_(gradient)
    moving = [(p, g) for p, g in zip(weights, total, strict=True) if g is not None]
    square = sum(float(g.double().square().sum()) for _, g in moving)
    if square == 0:
        return torch.zeros(num, dtype=torch.float64)
    step = STEPS[trainee.engine.precision] * sum(float(np.abs(s.sum(1)).sum()) for s in slopes.values()) / square
    derivative = _difference(trainee, examples, moving, step, check)
    return torch.from_numpy(np.sum([derivative[i] @ slopes[i] for i in slopes], axis=0))


@torch.no_grad()
def _difference(
    trainee: Trainee,
    examples: Sequence[Example],
    moving: Sequence[tuple[Tensor, Tensor]],
    step: float,
    check: Callable[[], None],
) -> list[np.ndarray]:
    """(logp(w + step g) - logp(w - step g)) / 2 step of each example's tokens [its C]; w comes back bit for bit."""
    engine = trainee.engine
    kept = [p.detach().clone() for p, _ in moving]
    found = []
    try:
        for sign in (1.0, -1.0):
            for (p, g), start in zip(moving, kept, strict=True):
                p.copy_(torch.add(start, g, alpha=sign * step))
            values = token_values(
                lambda batch: engine.forward(batch, frozenset()),
                examples,
                trainee.layout,
                trainee.max_tokens,
                engine.policy.device,
                check=check,
            )["token_logps"]
            found.append([np.concatenate([row.astype(np.float64) for row in rows]) for rows in values])
    finally:
        for (p, _), start in zip(moving, kept, strict=True):
            p.copy_(start)
    return [(above - below) / (2 * step) for above, below in zip(*found, strict=True)]
