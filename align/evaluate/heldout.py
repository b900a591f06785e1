"""Rewards of completions of held-out prompts to metrics: means, intervals, pass@k, and what changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.evaluate.passk import bootstrap, pass_at_k_interval
from align.evaluate.samples import paired_bootstrap
from align.jsons import Fields, Json

# A completion: {"rewards": {component: number or None}, "score": their weighted sum or None}
Scored = Fields


def heldout_metrics(
    greedy: Sequence[Scored], drawn: Sequence[Sequence[Scored]], names: Sequence[str], pass_component: str | None
) -> dict[str, float]:
    """Mean reward of the greedy completion of each prompt with its 95 % bootstrap interval over prompts; of the drawn
    ones, if there are any, the means and pass@k of a component (None: the first) that is 1 for a right completion.

    What no completion has is left out; for pass@k a completion without a reward is not right.
    """
    out: dict[str, float] = {}
    for name in ("total", *names):
        values = [v for v in (reward_of(c, name) for c in greedy) if v is not None]
        if values:
            interval = bootstrap(values)
            out |= {f"heldout/{name}_greedy": interval.mean}
            out |= {f"heldout/{name}_greedy_low": interval.low, f"heldout/{name}_greedy_high": interval.high}
    n = len(drawn[0]) if drawn else 0
    if n == 0:
        return out
    for name in names:
        values = [v for v in (reward_of(c, name) for group in drawn for c in group) if v is not None]
        out |= {f"heldout/{name}": float(np.mean(values))} if values else {}
    which = pass_component or names[0]
    right = [[(reward_of(c, which) or 0.0) >= 1.0 for c in group] for group in drawn]
    for k in sorted({1, n} | {2**i for i in range(1, n.bit_length()) if 2**i < n}):
        interval = pass_at_k_interval(right, k)
        out |= {f"heldout/pass@{k}": interval.mean}
        out |= {f"heldout/pass@{k}_low": interval.low, f"heldout/pass@{k}_high": interval.high}
    return out


def changes(before: Sequence[Scored], after: Sequence[Scored], names: Sequence[str]) -> Json:
    """Mean reward of the prompts' greedy completions before and after, by component, with the paired interval."""
    out = {}
    for name in names if len(names) == 1 else (*names, "total"):
        pairs = [(reward_of(a, name), reward_of(b, name)) for a, b in zip(before, after, strict=True)]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not known:
            continue
        first, last = zip(*known, strict=True)
        change = paired_bootstrap(first, last)
        out[name] = {
            "count": len(known),
            "before": float(np.mean(first)),
            "after": float(np.mean(last)),
            "change": {"mean": change.mean, "low": change.low, "high": change.high},
        }
    return out


def reward_of(completion: Scored, name: str) -> float | None:
    """The reward of a completion; name: a component, or total."""
    return completion["score"] if name == "total" else completion["rewards"][name]
