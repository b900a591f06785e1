"""One regime of the online update in one fresh process: `python -m tests.bench.online_worker REGIME --out FILE`."""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.models.policy import lora
from align.trainers.experience import Group
from tests.bench import data, measure
from tests.bench.online_data import ALGORITHMS, QUICK, REGIMES, Regime, make_groups, token_counts, told_by_engine
from tests.bench.online_sides import ALIGN, TRL, Align, Side, Trl
from tests.bench.worker import GRADIENT_TOLERANCE, Mismatch

LOSS_TOLERANCE = 1e-4  # not relative: the loss is a mean of advantages, which have spread 1 and whose sum is about 0
ENGINE_NOISE = 0.02  # nats per token, between a bfloat16 engine and its trainer


def models(regime: Regime) -> tuple[Any, Any | None]:
    """The policy and, where there is no adapter to switch off, its reference; they differ a little."""
    reference = data.reference_model(regime.model)
    if not regime.lora_rank:
        return data.policy_model(reference), reference
    policy = lora(reference, rank=regime.lora_rank, alpha=regime.lora_rank, dropout=0.0, targets="all-linear", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:  # zeros at the start
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.002)
    return policy.train(), None


def both_sides(regime: Regime) -> tuple[Trl, Align, list[Group]]:
    """The two frameworks around equal models of their own, and what both are to learn from."""
    algorithm = ALGORITHMS[regime.algorithm]
    policy, reference = models(regime)
    groups = told_by_engine(make_groups(regime), policy, ENGINE_NOISE if algorithm.engine else 0.0)
    if algorithm.kl_in_reward == 0:
        reference = None
    trl = Trl(copy.deepcopy(policy), copy.deepcopy(reference), algorithm, regime.n, regime.n * regime.num_prompts)
    return trl, Align(policy, reference, algorithm), groups


def sides_of(regime: Regime, trl: Trl, align: Align) -> dict[str, Side]:
    """Variant -> side, TRL's default first."""
    extra = {"align old pass"} if regime.algorithm == "rloo" else set()
    if regime.layouts:
        extra |= {"align padded", "align packed"}
    ours = [v for v in ALIGN if v == "align" or v in extra]
    return {v: trl for v in TRL} | {v: align for v in ours}


def check(sides: dict[str, Side], groups: Sequence[Group], same_loss: bool) -> dict[str, dict[str, float]]:
    """One step of each variant: its loss and gradient and their distance to TRL's default.

    Raises Mismatch beyond the tolerances. same_loss: whether the frameworks agree on the number that they minimise.
    """
    results = {}
    truth_loss, truth = 0.0, None
    for variant, side in sides.items():
        side.keep = True
        loss = side.step(variant, groups)
        flat = side.gradient
        side.keep, side.gradient = False, None
        assert flat is not None
        if truth is None:
            truth_loss, truth = loss, flat
        apart = abs(loss - truth_loss) if same_loss else math.nan
        turned = float((flat - truth).double().norm() / truth.double().norm())
        if apart > LOSS_TOLERANCE or not turned <= GRADIENT_TOLERANCE:
            raise Mismatch(
                f"{variant}: loss {loss:.7f} against {truth_loss:.7f} (allowed {LOSS_TOLERANCE:.0e}), gradient "
                f"{turned:.1e} apart (allowed {GRADIENT_TOLERANCE:.0e})"
            )
        results[variant] = {"loss": loss, "loss_apart": apart, "gradient_apart": turned}
    return results


def measure_time(regime: Regime, rounds: int) -> dict[str, Any]:
    """Seconds of an update of each variant, alternating; the steps that check equality also warm up."""
    trl, align, groups = both_sides(regime)
    sides = sides_of(regime, trl, align)
    equality = check(sides, groups, regime.algorithm != "rloo")
    cpu: dict[str, list[float]] = {v: [] for v in sides}
    wall: dict[str, list[float]] = {v: [] for v in sides}
    for _ in range(rounds):
        for variant, side in sides.items():
            c, w, _ = measure.timed(partial(side.step, variant, groups))
            cpu[variant].append(c)
            wall[variant].append(w)
    return {"tokens": token_counts(groups), "equality": equality, "cpu_s": cpu, "wall_s": wall}


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("regime", choices=[*REGIMES, QUICK.name])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    measure.limit_threads()
    regime = REGIMES.get(arguments.regime, QUICK)
    arguments.out.write_text(json.dumps(measure_time(regime, arguments.rounds)))


if __name__ == "__main__":
    main()
