"""What several rewards cost: influences of gradients against ordinary steps and K whole backward passes, updates with
them, and the scalar composers. Prints a table and writes JSON.

    python -m tests.bench.influence OUT.json [--model proxy|smollm2|nano] [--rounds N] [--precision float32|bfloat16]

Runs where torch puts it: on a GPU if there is one. Cost is in ordinary steps (forward, backward, optimiser), median of
alternating rounds; CPU seconds on a CPU, wall seconds on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config import OptimizerConfig
from align.engine.local import LocalEngine
from align.models.policy import Policy
from align.packing import pack
from align.trainers import influence
from align.trainers.experience import examples, with_columns
from align.trainers.loop import TrainContext, train_step
from align.types import Estimate, Example
from tests.bench.data import policy_model_alone
from tests.bench.measure import summary
from tests.bench.online_data import QUICK, REGIMES, clipped, make_groups
from tests.composers.parts import OPTIONS, call, observed, option

OBJECTIVES = (2, 4, 8)
STEPS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MICRO_BATCH_TOKENS = 1 << 20


def main() -> None:
    """See the module."""
    words = argparse.ArgumentParser()
    words.add_argument("out", type=Path)
    words.add_argument("--model", default="proxy")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--precision", default="float32")
    given = words.parse_args()
    found = measured(given.model, given.rounds, given.precision)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))


def measured(model: str, rounds: int, precision: str = "float32") -> dict[str, Any]:
    """Costs in ordinary steps, relative errors, and milliseconds of the scalar composers at K = 4."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    context, parts, num_tokens = made(model, device, precision)
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(num_tokens, max(OBJECTIVES), generator=generator, dtype=torch.float64)
    ordinary = with_columns(parts, Estimate({"advantages": advantages[:, 0]}), {})
    works: dict[str, Callable[[], Any]] = {"step": lambda: train_step(context, ordinary, 0.0)}
    for k in OBJECTIVES:
        works[f"naive {k}"] = lambda k=k: naive(context, parts, advantages[:, :k])
        for how in ("exact", "directional"):
            works[f"{how} {k}"] = lambda k=k, how=how: told(context, parts, advantages[:, :k], how)
        for apply, update in (("now", told_before), ("next", told_beside)):
            works[f"update {apply} {k}"] = lambda k=k, update=update: update(context, ordinary, advantages[:, :k])
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(clocked(work, device))
    step = summary(times["step"])["median"]
    truth = naive(context, parts, advantages[:, :4], torch.float64)
    errors = {"exact": apart(told(context, parts, advantages[:, :4], "exact"), truth)}
    usual = dict(influence.STEPS)
    for size in STEPS:
        influence.STEPS[context.engine.precision] = size
        errors[f"directional {size:g}"] = apart(told(context, parts, advantages[:, :4], "directional"), truth)
    influence.STEPS.update(usual)
    errors["update next"] = apart(told_beside(context, ordinary, advantages[:, :4]), truth)
    return {
        "model": model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "one CPU core",
        "precision": precision,
        "tokens": num_tokens,
        "step_s": step,
        "cost": {name: summary([t / step for t in values]) for name, values in times.items()},
        "errors": errors,
        "scalar_ms": {path.stem: scalar_seconds(path.stem, num_tokens) * 1e3 for path in OPTIONS},
    }


def made(model: str, device: torch.device, precision: str) -> tuple[TrainContext, list[Example], int]:
    """A policy with GRPO's objective, and a step's completions without advantages."""
    regime = QUICK if model == "nano" else replace(REGIMES["mixed n=8"], model=model)
    policy = Policy(policy_model_alone(model).to(device), "shared")
    optimizer = OptimizerConfig(1e-6, [0.9, 0.95], 1e-8, 0.0, None, "constant", 0.0, 1.0)
    engine = LocalEngine(policy, optimizer, getattr(torch, precision))
    context = TrainContext(engine, clipped(), "shared", MICRO_BATCH_TOKENS, None)
    parts = examples(make_groups(regime), "keep", "shared", MICRO_BATCH_TOKENS)
    return context, parts, int(pack(parts, "shared").lengths.sum())


def told(context: TrainContext, parts: list[Example], advantages: torch.Tensor, how: str) -> torch.Tensor:
    """Influences as a run has them, without clipping."""
    return influence.measure(context, parts, advantages, how, None, None).influences


def told_before(context: TrainContext, parts: list[Example], advantages: torch.Tensor) -> torch.Tensor:
    """An update as composer.apply=now has it: influences, then the step."""
    found = told(context, parts, advantages, "directional")
    train_step(context, parts, 0.0)
    return found


def told_beside(context: TrainContext, parts: list[Example], advantages: torch.Tensor) -> torch.Tensor:
    """An update as composer.apply=next has it: influences from the passes of the step."""
    beside = influence.Directional(context, parts, advantages, None)
    train_step(context, beside.examples, 0.0, beside)
    return beside.influences


def naive(
    context: TrainContext, parts: list[Example], advantages: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """K steps whose gradients are kept as they are, and multiplied flat as the authors' code does; float64 is right."""
    engine, kept = context.engine, []

    def keep(_: float) -> None:
        kept.append(torch.cat([p.grad.flatten() for p in engine.parameters.values()]))
        engine.optimizer.zero_grad(set_to_none=True)

    step, engine.step = engine.step, keep  # type: ignore[method-assign]
    try:
        for k in range(advantages.shape[1]):
            train_step(context, with_columns(parts, Estimate({"advantages": advantages[:, k]}), {}), 0.0)
    finally:
        engine.step = step  # type: ignore[method-assign]
    rows = [g.to(dtype) for g in kept]
    return torch.stack([torch.stack([a @ b for b in rows]).sum() for a in rows]).double().cpu()


def apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference, relative to the largest influence."""
    return float((found - truth).abs().max() / truth.abs().max())


def scalar_seconds(stem: str, num_tokens: int, repeats: int = 5) -> float:
    """Least seconds of a call on as many rows as the step has tokens, and of an update; K = 3 or 4 with the KL."""
    composer = option(stem)
    seconds = []
    for k in range(repeats):
        start = time.perf_counter()
        call(composer, rows=num_tokens, seed=k)
        composer.update(observed(k))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def clocked(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds: of this process's CPU time, or of the wall with a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def table(found: dict[str, Any]) -> list[str]:
    """Markdown."""
    head = f"{found['model']}, {found['tokens']} tokens of completions, {found['precision']}, {found['device']}"
    lines = [f"{head}; an ordinary step takes {found['step_s']:.3f} s", "", "| | " + " | ".join(
        f"K = {k}" for k in OBJECTIVES) + " |", "|---|" + "---|" * len(OBJECTIVES)]  # fmt: skip
    for how in ("naive", "exact", "directional", "update now", "update next"):
        cells = [f"{found['cost'][f'{how} {k}']['median']:.2f}" for k in OBJECTIVES]
        lines.append(f"| {how} | " + " | ".join(cells) + " |")
    lines += ["", *(f"error, {name}: {value:.1e}" for name, value in found["errors"].items()), ""]
    worst = max(found["scalar_ms"].items(), key=lambda item: item[1])
    share = worst[1] / 1e3 / found["step_s"]
    return [*lines, f"scalar composers: at most {worst[1]:.2f} ms ({worst[0]}), {100 * share:.2f} % of a step"]


if __name__ == "__main__":
    np.random.seed(0)
    main()
