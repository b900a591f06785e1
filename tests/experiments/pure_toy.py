"""Fillers under the sum of process rewards and under their minimum, on a tabular chain of steps.

    python -m tests.experiments.pure_toy [--seeds 0,1,2] [--out docs/experiments]

At most 12 steps, each good (+0.4; one in ten fails: -0.6), filler (+0.35), wrong (-0.6) or stop (+0.6 after two good
steps and no error, else -0.3, and the end). One softmax per place and number of good steps. The estimators are those
of align.advantages.process, which also get the verifiable score 1 of a stop after two good steps and no error.
Writes pure_toy.md.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from align.advantages.process import PURE, PUREStrictMin
from align.types import Episodes

LIMIT, GOOD, FILLER, WRONG, STOP = 12, 0, 1, 2, 3
PROMPTS, SAMPLES = 16, 4
FORMS = {
    "sum to go (PUREStrictMin, aggregate sum)": PUREStrictMin("sum", LIMIT, "none", 1.0),
    "minimum to go (PUREStrictMin, aggregate min)": PUREStrictMin("min", LIMIT, "none", 1.0),
    "minimum to go, no verifiable score": PUREStrictMin("min", LIMIT, "none", 0.0),
    "sum, baseline per token (PURE, temperature null)": PURE(None, "token", 1.0),
    "about the minimum, baseline per token (PURE)": PURE(0.1, "token", 1.0),
}


def draw(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Actions, states and process rewards [N, LIMIT], NaN after the end; whether solved [N]; number of fillers [N]."""
    num = PROMPTS * SAMPLES
    good, error, ended = torch.zeros(num, dtype=torch.long), torch.zeros(num) > 0, torch.zeros(num) > 0
    solved = ended.clone()
    actions, states = torch.zeros(num, LIMIT, dtype=torch.long), torch.zeros(num, LIMIT, dtype=torch.long)
    rewards = torch.full((num, LIMIT), math.nan, dtype=torch.float64)
    for place in range(LIMIT):
        states[:, place] = good.clamp(max=2)
        action = torch.multinomial(logits[place, states[:, place]].softmax(-1), 1, generator=generator)[:, 0]
        failed = (action == WRONG) | ((action == GOOD) & (torch.rand(num, generator=generator) < 0.1))
        done = (action == STOP) & (good >= 2) & ~error
        earned = torch.where(action == GOOD, 0.4, 0.35).double()
        earned[failed] = -0.6
        earned[action == STOP] = -0.3
        earned[done] = 0.6
        rewards[:, place] = torch.where(ended, math.nan, earned)
        actions[:, place] = action
        solved |= done & ~ended
        good = good + ((action == GOOD) & ~failed & ~ended)
        error = error | (failed & ~ended)
        ended = ended | (action == STOP)
    fillers = ((actions == FILLER) & ~rewards.isnan()).sum(1)
    return actions, states, rewards, solved, fillers


def learned(estimator: PURE | PUREStrictMin, seed: int, steps: int = 250, lr: float = 2.0) -> dict[str, float]:
    """Mean length, fillers and success of the last 20 of `steps` updates by plain gradient ascent."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(LIMIT, 3, 4, dtype=torch.float64)
    group = torch.arange(PROMPTS).repeat_interleave(SAMPLES)
    found = []
    for _ in range(steps):
        actions, states, rewards, solved, fillers = draw(logits, generator)
        taken = ~rewards.isnan()
        row, place = taken.nonzero(as_tuple=True)
        episodes = Episodes(
            scores=solved.double(),
            group=group,
            row=row,
            truncated=taken.all(1),
            steps=rewards[taken],
        )
        advantages = estimator(episodes).columns["advantages"][:, None]
        state = states[taken]
        score = torch.nn.functional.one_hot(actions[taken], 4) - logits[place, state].softmax(-1)
        change = torch.zeros_like(logits).index_put((place, state), advantages * score, accumulate=True)
        logits = logits + lr * change / len(solved)
        found.append([float(v.double().mean()) for v in (taken.sum(1), fillers, solved)])
    length, filler, success = torch.tensor(found[-20:]).mean(0).tolist()
    return {"length": length, "fillers": filler, "success": success}


def main() -> None:
    """Measure both forms on all seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"))
    args = parser.parse_args()
    began = time.perf_counter()
    lines = []
    for name, estimator in FORMS.items():
        runs = [learned(estimator, int(seed)) for seed in args.seeds.split(",")]
        cells = (" ".join(f"{run[key]:.2f}" for run in runs) for key in ("length", "fillers", "success"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    seconds = time.perf_counter() - began
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pure_toy.md").write_text(
        f"""# Fillers under sum and minimum of process rewards

A chain of at most {LIMIT} steps: good (+0.4; one in ten fails: -0.6), filler (+0.35), wrong (-0.6) or stop (+0.6 after
two good steps and no error, else -0.3). {PROMPTS} prompts of {SAMPLES} completions, 250 updates; means of the last 20,
one number per seed ({args.seeds}). Made by `python -m tests.experiments.pure_toy --seeds {args.seeds}` in
{seconds:.0f} s.

| process rewards | steps | fillers | solved |
|---|---|---|---|
{table}

About 0.81 is the most that can be solved: two good steps in a row without a failure. With one baseline for all tokens
the sum-form fills the limit with fillers and the minimum does not. A baseline in proportion to the tokens of a step
takes off what fillers earn on average, and leaves little of the difference here. Without the verifiable score the
smallest process reward is best served by stopping early.
"""
    )


if __name__ == "__main__":
    main()
