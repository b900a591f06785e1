"""Whether a factor on all rewards changes what an estimator of advantages says: asked of the estimator itself."""

from __future__ import annotations

from typing import Any

from align.deferred import torch
from align.types import Episodes

PROMPTS, COMPLETIONS, FACTOR = 4, 4, 2.0
NO_EFFECT = 1e-3  # relative change of advantages under FACTOR; the epsilons of estimators leave some 1e-5


def rescaling_effect(advantage: Any, penalties: bool) -> float:
    """Largest change of advantages, relative to the largest advantage, when all rewards are doubled.

    Probed on 16 made-up completions with distinct scores. Values of a value head double too, as they do once it has
    learnt. penalties: with a KL in the reward, which is not doubled.
    """
    once, twice = (advantage(probe(factor, penalties)).columns["advantages"] for factor in (1.0, FACTOR))
    return float((twice - once).abs().max() / once.abs().max().clamp(min=1e-12))


def columns_of(advantage: Any) -> set[str]:
    """Names of the columns that an estimator gives: as it says, or else as it does."""
    said = advantage.columns if _speaks_for_itself(advantage, "columns") else None
    return set(advantage(probe(1.0, False)).columns if said is None else said)


def _speaks_for_itself(advantage: object, name: str) -> bool:
    """Whether no class below the one that says it has a __call__ of its own, of which it may be untrue."""
    own = (kind for kind in type(advantage).__mro__ if {name, "__call__"} & vars(kind).keys())
    return name in vars(next(own))


def refuse_without_effect(advantage: Any, choice: str, penalties: bool) -> None:
    """Raises ValueError if a factor on all rewards is a no-op under the estimator called `choice`."""
    if _speaks_for_itself(advantage, "scale_free") and advantage.scale_free is False:
        return
    effect = rescaling_effect(advantage, penalties)
    if effect < NO_EFFECT:
        raise ValueError(
            f"composer.target=reward: has no effect with advantage={choice}, which divides a factor on all rewards "
            f"out again (advantages change by {effect:.0e}); use composer.target=advantage, or an estimator that does "
            "not divide by a standard deviation (advantage=rloo, dr_grpo or remax), or composer.allow_no_effect=true"
        )


def probe(factor: float, penalties: bool) -> Episodes:
    """16 made-up completions with all that an estimator can read."""
    num = PROMPTS * COMPLETIONS
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(num) % 3 + 1
    row = torch.arange(num).repeat_interleave(lengths)
    draws = torch.rand(num + PROMPTS + 2 * len(row), generator=generator, dtype=torch.float64) * 0.4 + 0.1
    scores, greedy, values, steps = draws.split([num, PROMPTS, len(row), len(row)])
    return Episodes(
        scores=factor * scores,
        group=torch.arange(PROMPTS).repeat_interleave(COMPLETIONS),
        row=row,
        truncated=torch.zeros(num, dtype=torch.bool),
        greedy=factor * greedy,
        penalties=0.1 * values - 0.03 if penalties else None,
        values=factor * values,
        steps=factor * steps,
        answers=tuple(str(i % 3) for i in range(num)),
    )
