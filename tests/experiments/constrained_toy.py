"""Over-optimisation on a toy with two correlated proxies: a plain sum against the constrained forms, by the composers.

    python -m tests.experiments.constrained_toy

A completion is 20 tokens of 4 kinds from a table of logits. r_1 = share of a + 0.3 share of b, r_2 = share of b; gold
is minus the squared distance of the mean proxies from (0.45, 0.30), beyond which they stand for nothing any more. What
is maximised is never told the gold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from align.composers.base import Composer, Observed
from align.composers.fixed import Fixed, Satisficing
from align.composers.lagrangian import Lagrangian
from align.composers.multipliers import GradientMultipliers

NAMES = ("first", "second")
THRESHOLDS = (0.45, 0.30)
LENGTH, KINDS, BATCH, STEPS = 20, 4, 64, 400
RATE = 0.5  # of the logits, plain gradient ascent on whitened advantages
MULTIPLIER_LR = 2.0  # fast: there are 400 steps


@dataclass(frozen=True)
class Course:
    """Of a run. gold, first, second: of the exact means under the policy, after each step."""

    gold: list[float]
    means: list[tuple[float, float]]
    multipliers: list[tuple[float, float]]


def composers() -> dict[str, Composer]:
    """By name; all see what the same estimator sees."""
    thresholds = dict(zip(NAMES, THRESHOLDS, strict=True))

    def lagrangian(squash: str, relation: str) -> Lagrangian:
        rule = GradientMultipliers(squash, MULTIPLIER_LR, 0.1, 0.5, 0.0)
        return Lagrangian(
            NAMES, thresholds=thresholds, ranges={}, relation=relation, objective={"kl": 1.0}, rule=rule,
            mix="complement", whiten=True, epsilon=1e-8, search=None,
        )  # fmt: skip

    return {
        "sum": Fixed(NAMES, weights=None, normalise="none", epsilon=1e-8, target="reward"),
        "mu": lagrangian("sigmoid", "at_least"),
        "xi": lagrangian("tanh", "equal"),
        "sat": Satisficing(NAMES, thresholds=thresholds),
    }


def run(composer: Composer, seed: int) -> Course:
    """Policy gradient with the composer's advantages."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(LENGTH, KINDS, dtype=torch.float64)
    start = logits.log_softmax(1)
    gold, means, multipliers = [], [], []
    for _ in range(STEPS):
        probabilities = logits.softmax(1)
        tokens = torch.multinomial(probabilities, BATCH, replacement=True, generator=generator).T  # [64, 20]
        chosen = torch.nn.functional.one_hot(tokens, KINDS).double()
        a, b = chosen[..., 0].mean(1), chosen[..., 1].mean(1)
        rewards = torch.stack([a + 0.3 * b, b], 1)
        log_ratio = (chosen * (logits.log_softmax(1) - start)).sum((1, 2))
        if composer.target == "reward":
            scores = composer(rewards)
            advantages = (scores - scores.mean()) / (scores.std() + 1e-8)
        else:
            streams = rewards if "kl_stream" not in composer.needs else torch.cat([rewards, -log_ratio[:, None]], 1)
            advantages = composer(streams, torch.ones(BATCH, dtype=torch.bool))
        # sum over tokens of A d log p / d logits, mean over completions
        logits += RATE * (advantages[:, None, None] * (chosen - probabilities)).mean(0)
        composer.update(Observed(means=rewards.mean(0)))
        expected = logits.softmax(1).mean(0)
        now = (float(expected[0] + 0.3 * expected[1]), float(expected[1]))
        means.append(now)
        gold.append(-sum((x - t) ** 2 for x, t in zip(now, THRESHOLDS, strict=True)))
        told = composer.metrics()
        multipliers.append(tuple(told.get(f"multiplier/{n}", 0.0) for n in NAMES))
    return Course(gold, means, multipliers)


def main(seeds: range = range(5)) -> None:
    """A table: peak and last gold, last means, of each seed."""
    print("| | gold at its peak | gold at the end | mean proxies at the end |\n|---|---|---|---|")
    for name in composers():
        courses = [run(composers()[name], seed) for seed in seeds]
        peaks = ", ".join(f"{max(c.gold):.3f}" for c in courses)
        ends = ", ".join(f"{c.gold[-1]:.3f}" for c in courses)
        last = ", ".join(f"({a:.2f}, {b:.2f})" for a, b in (c.means[-1] for c in courses))
        print(f"| {name} | {peaks} | {ends} | {last} |")


if __name__ == "__main__":
    main()
