"""Over-optimisation: the best of n verses by a proxy, judged by gold: one reward model, ensembles and the WARM average.

    python -m tests.experiments.overoptimisation [--seeds 5] [--runs DIR] [--out DIR]

The reward models are those of warm.py: read from --runs, trained first where they are not there. The curves are those
of align.evaluate.overoptimisation. Writes docs/experiments/overoptimisation.md, .json and .png.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from align.evaluate.overoptimisation import report, write
from align.rewards import combine
from tests.experiments import kjv, warm

COEFFICIENT = 0.5  # of UWO: Coste et al. 2023, arXiv 2310.02743, for best-of-n
SHOWN = (16, 256, 1024)  # n in the tables
NAMES = {
    "single": "one reward model, the first member",
    "mean": "mean of the scores of six",
    "WCO": "the lowest of six scores",
    "UWO": f"mean less {COEFFICIENT} times the variance (ddof 0)",
    "WARM": "mean of the weights of six",
}


def proxies(each: np.ndarray, average: np.ndarray) -> dict[str, np.ndarray]:
    """Each proxy's scores [N] from those of the members [M, N] and of the average of their weights [N].

    The first is what the others are compared to.
    """
    return {
        "single": each[0],
        "mean": combine.mean(each),
        "WCO": combine.worst(each),
        "UWO": combine.uncertainty(each, COEFFICIENT, 0),
        "WARM": average,
    }


def _shown(value: dict[str, Any], sign: str = "+") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def line(data: dict[str, Any], name: str) -> str:
    """A line of the first table: gold."""
    curve = data["curves"][name]
    law, peak = curve["fits"]["bon"], curve["measured_peak"]
    cells = [f"{name}: {NAMES[name]}", *(_shown(curve["gold"][data["n"].index(k)]) for k in SHOWN)]
    cells += [f"{peak['gold']:+.3f} at n = {peak['n']}", f"{curve['lost_after_peak']:.3f}"]
    cells.append(f"{law['alpha']:.3f}, {law['beta']:.3f}")
    cells.append(f"{curve['proxy'][-1]['mean'] - curve['gold'][-1]['mean']:+.3f}")
    return "| " + " | ".join(cells) + " |"


def less_first(data: dict[str, Any], name: str) -> str:
    """A line of the second table: gold less that of the first proxy, seed by seed."""
    gaps = [data["curves"][name]["gold_minus_first"][data["n"].index(k)] for k in SHOWN]
    apart = [str(k) for k, gap in zip(SHOWN, gaps, strict=True) if gap["low"] > 0 or gap["high"] < 0]
    return "| " + " | ".join([name, *map(_shown, gaps), ", ".join(apart) or "none"]) + " |"


def falls(data: dict[str, Any]) -> str:
    """Lines on the curves whose mean gold is highest before the largest n, and whether that is more than chance."""
    out, shown = [], []
    for name, curve in data["curves"].items():
        peak, last = curve["measured_peak"], curve["gold"][-1]
        if peak["n"] == data["n"][-1]:
            continue
        shown.append(last["high"] < peak["gold"])
        said = "that is over-optimisation" if shown[-1] else "the interval there holds the highest mean"
        out.append(
            f"- {name}: mean gold is highest at n = {peak['n']} and {curve['lost_after_peak']:.3f} lower at "
            f"n = {data['n'][-1]}; {said}."
        )
    if not any(shown):
        out.append("- Over-optimisation, a loss of gold beyond chance, is shown by no curve.")
    return "\n".join(out)


def page(data: dict[str, Any]) -> str:
    """docs/experiments/overoptimisation.md."""
    first = data["first"]
    count = data["num_seeds"]
    return (
        f"""# Over-optimisation: the best of n by a proxy, judged by gold

Question: how much gold does choosing among more and more texts by a reward model win, when does it lose, and do
ensembles or the average of weights lose less than one model?

The reward models are those of [warm.md](warm.md): six members of each of {count} seeds, trained on pairs with a quarter
of the labels flipped, from one probed head. Choosing is from {data["num_completions"] // count} verses that no training
saw, by the unbiased best-of-n estimate, n = 1 to {data["n"][-1]}; gold is VADER. Gold is in standard deviations of the
pool, proxies each in their own, both less their value at n = 1. Made by
`python -m tests.experiments.overoptimisation --seeds {count}`, in seconds where the models are there. Intervals: 95 %,
Student's t over {count} seeds (each has its own pool and models); differences are paired by seed.

![gold and proxy against the square root of KL](overoptimisation.png)

| gold of | {" | ".join(f"n = {k}" for k in SHOWN)} | highest mean | lost from there to n = {data["n"][-1]} \
| alpha, beta of d (alpha - beta d) | proxy - gold, n = {data["n"][-1]} |
|---|---|---|---|---|---|---|---|
"""
        + "\n".join(line(data, name) for name in data["curves"])
        + f"""

| gold less that of {first} | {" | ".join(f"n = {k}" for k in SHOWN)} | interval without 0, n |
|---|---|---|---|---|
"""
        + "\n".join(less_first(data, name) for name in data["curves"] if name != first)
        + f"""

{falls(data)}
- The proxy goes on to promise more than gold gives: the last column of the first table.
- The intervals are {len(data["curves"]) - 1} x {len(SHOWN)} looks at the same seeds, not corrected for their number.
- alpha and beta are fitted to the mean curve; those of each seed are in overoptimisation.json.

What it does not show: choosing from a fixed pool isolates the error of the reward model from that of training a policy
on it, so that nothing here is about reinforcement learning. n = 1024 of 2000 is decided by the few verses that the
proxy likes best, and the estimates at neighbouring n share them: the interval is over seeds, not over verses. UWO's
coefficient is in units of 1 / score and was not tuned to the scale of these scores. The single model is the first
member, not the best of six.
"""
    )


def main() -> None:
    """Score the pools of all seeds, draw the curves and write the page."""
    args = warm.arguments(__doc__).parse_args()
    rows = []
    for seed in range(args.seeds):
        data = kjv.pairs(seed, **warm.SIZE)
        run = warm.trained(data, seed, args.runs)
        each = np.stack([found["pool"] for found in warm.members(data, run)])
        average = warm.scores(data, run / "final")["pool"]
        rows.append((f"seed {seed}", kjv.scored(data.pool, proxies(each, average), seed)))
    found = report(rows)
    write(found, args.out, "Best of n verses by reward models trained on 25 % wrong labels")
    (args.out / "overoptimisation.md").write_text(page(found))


if __name__ == "__main__":
    main()
