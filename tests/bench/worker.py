"""One measurement in one fresh process: `python -m tests.bench.worker KIND REGIME --out FILE`.

KIND is time (all variants, alternating), epoch (with the passes that fill the caches) or memory
(one variant).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.types import Example
from tests.bench import data, measure
from tests.bench.sides import ALIGN_VARIANTS, TRL_VARIANTS, Align, Cache, Side, Trl

LOSS_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = 1e-3  # relative, in norm: float32 noise is about 1e-5, SmolLM2 4e-5


class Mismatch(RuntimeError):
    """Two sides do not compute the same thing, so their times must not be compared."""


def adamw(model: Any) -> torch.optim.AdamW:
    """Fused AdamW, the optimiser of both frameworks. Rate 0: each step is the same step."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def step(side: Side, variant: str, pairs: Sequence[Example], optimizer: torch.optim.Optimizer) -> float:
    """A whole optimiser step, batch to weights; the loss."""
    loss = side.loss(variant, pairs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def gradient(side: Side, variant: str, pairs: Sequence[Example]) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient."""
    loss = side.loss(variant, pairs)
    loss.backward()
    parameters = list(side.policy.parameters())
    flat = torch.cat([p.grad.flatten() for p in parameters])
    side.policy.zero_grad(set_to_none=True)
    return float(loss.detach()), flat


def both_sides(regime: data.Regime) -> tuple[Trl, Align]:
    """The two frameworks around equal policies, each with its own, and one frozen reference."""
    reference = data.reference_model(regime.model)
    theirs, ours = data.policy_model(reference), data.policy_model(reference)
    return Trl(theirs, copy.deepcopy(reference)), Align(ours, reference)


def check(sides: dict[str, Side], pairs: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Loss of each variant and its distance to TRL's default. Mismatch beyond the tolerances."""
    results = {}
    truth_loss, truth = 0.0, None
    for variant, side in sides.items():  # TRL's default is the first
        loss, flat = gradient(side, variant, pairs)
        if truth is None:
            truth_loss, truth = loss, flat
        apart = abs(loss - truth_loss) / abs(truth_loss)
        turned = float((flat - truth).double().norm() / truth.double().norm())
        if apart > LOSS_TOLERANCE or turned > GRADIENT_TOLERANCE:
            raise Mismatch(
                f"{variant}: loss {loss:.7f} against {truth_loss:.7f} (relative {apart:.1e}, "
                f"allowed {LOSS_TOLERANCE:.0e}), gradient {turned:.1e} apart "
                f"(allowed {GRADIENT_TOLERANCE:.0e})"
            )
        results[variant] = {"loss": loss, "loss_apart": apart, "gradient_apart": turned}
    return results


def measure_time(regime: data.Regime, rounds: int) -> dict[str, Any]:
    """Seconds of an optimiser step of each variant, alternating; equality is checked first."""
    pairs = data.make_pairs(regime, regime.num_pairs)
    trl, align = both_sides(regime)
    align.cache = trl.cache = align.cache_pass(pairs)
    sides: dict[str, Side] = {v: trl for v in TRL_VARIANTS} | {v: align for v in ALIGN_VARIANTS}
    equality = check(sides, pairs)
    optimizers = {id(side): adamw(side.policy) for side in (trl, align)}
    cpu: dict[str, list[float]] = {v: [] for v in sides}
    wall: dict[str, list[float]] = {v: [] for v in sides}
    for number in range(rounds + 1):  # the first makes the optimiser's states and is not kept
        for variant, side in sides.items():
            c, w, _ = measure.timed(partial(step, side, variant, pairs, optimizers[id(side)]))
            if number:
                cpu[variant].append(c)
                wall[variant].append(w)
    return {"tokens": data.token_counts(pairs), "equality": equality, "cpu_s": cpu, "wall_s": wall}


def measure_epoch(regime: data.Regime, steps: int) -> dict[str, Any]:
    """CPU seconds of one epoch of `steps` steps, and of the pass that fills each side's cache."""
    pairs = data.make_pairs(regime, steps * regime.num_pairs, seed=1)
    trl, align = both_sides(regime)
    sides: dict[str, Side] = {"trl default": trl, "trl best": trl, "align": align}
    optimizers = {id(side): adamw(side.policy) for side in (trl, align)}
    warm = pairs[: regime.num_pairs]
    align.cache = trl.cache = align.cache_pass(warm)
    for variant, side in sides.items():
        step(side, variant, warm, optimizers[id(side)])

    ours_pass, _, cache = measure.timed(partial(align.cache_pass, pairs))
    theirs_pass, _, _ = measure.timed(partial(trl.cache_pass, pairs, regime.num_pairs))
    align.cache = trl.cache = cache
    seconds: dict[str, list[float]] = {v: [] for v in sides}
    for start in range(0, len(pairs), regime.num_pairs):
        batch = pairs[start : start + regime.num_pairs]
        losses = {}
        for variant, side in sides.items():
            c, _, losses[variant] = measure.timed(partial(step, side, variant, batch, optimizers[id(side)]))
            seconds[variant].append(c)
        for variant, loss in losses.items():
            if abs(loss - losses["trl default"]) > LOSS_TOLERANCE * abs(losses["trl default"]):
                raise Mismatch(f"{variant}: losses of one batch differ: {losses}")
    passes = {"trl default": 0.0, "trl best": theirs_pass, "align": ours_pass}
    return {"steps": steps, "pairs": regime.num_pairs, "pass_cpu_s": passes, "steps_cpu_s": seconds}


def measure_memory(regime: data.Regime, variant: str, steps: int = 2) -> dict[str, float]:
    """Resident MiB right before the first step, everything loaded, and at the peak."""
    pairs = data.make_pairs(regime, regime.num_pairs)
    needs_reference = variant in ("trl default", "trl no recompute") or (
        variant in ALIGN_VARIANTS and not ALIGN_VARIANTS[variant][1]
    )
    if needs_reference:
        reference = data.reference_model(regime.model)
        policy = data.policy_model(reference)
    else:
        reference, policy = None, data.policy_model_alone(regime.model)
    # memory does not depend on the reference's values, and a pass here would leave its traces
    side = (Trl if variant in TRL_VARIANTS else Align)(policy, reference, _constant_cache(pairs))
    optimizer = adamw(policy)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measure.settle_memory()
    measure.reset_peak()
    base = measure.resident_mib()
    for _ in range(steps):
        step(side, variant, pairs, optimizer)
    peak = measure.resident_mib(peak=True)
    return {"base_mib": base, "peak_mib": peak, "dynamic_mib": peak - base}


def _constant_cache(pairs: Sequence[Example]) -> Cache:
    counts = {p.source: int(p.rows[0].targets.sum() + p.rows[1].targets.sum()) for p in pairs}
    return {source: np.full(count, -9.0, np.float32) for source, count in counts.items()}


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["time", "epoch", "memory"])
    parser.add_argument("regime", choices=[*data.REGIMES, data.QUICK.name])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variant", choices=[*TRL_VARIANTS, *ALIGN_VARIANTS], default="align")
    arguments = parser.parse_args()
    measure.limit_threads()
    regime = data.REGIMES.get(arguments.regime, data.QUICK)
    if arguments.kind == "time":
        result = measure_time(regime, arguments.rounds)
    elif arguments.kind == "epoch":
        result = measure_epoch(regime, arguments.steps)
    else:
        result = measure_memory(regime, arguments.variant)
    arguments.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
