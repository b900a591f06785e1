"""Samples that were judged to numbers with intervals: pass@k and the mean reward. Prompts are what is resampled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from align.evaluate.samples import Interval

_RESAMPLES = 10_000
_ROWS = 500  # resamples held in memory at the same time


def pass_at_k(num_right: int, num_samples: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one: unbiased for k fresh samples.

    1 - C(n - c, k) / C(n, k) with n samples of which c are right, 1 <= k <= n. Chen et al. 2021, Evaluating Large
    Language Models Trained on Code, eq. 1; arXiv 2107.03374.
    """
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} right of {num_samples} samples: must be from 0 to the number of samples")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: k must be from 1 to the number of samples; draw more")
    # whole numbers of any size: exact, where the product of ratios rounds
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def pass_at_k_interval(right: Sequence[Sequence[bool]], k: int, seed: int = 0) -> Interval:
    """Mean pass@k over prompts, with its bootstrap interval. right: of each prompt, whether each sample is right."""
    return bootstrap([pass_at_k(sum(map(bool, group)), len(group), k) for group in right], seed)


def mean_reward_interval(rewards: Sequence[Sequence[float | None]], seed: int = 0) -> Interval:
    """Mean over prompts of the mean reward of their samples, with its bootstrap interval.

    None and NaN are missing, which is not 0: a prompt counts by the samples that have a reward, without any not at all.
    """
    known = [[r for r in group if r is not None and not math.isnan(r)] for group in rewards]
    return bootstrap([sum(group) / len(group) for group in known if group], seed)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of one value a prompt, and the central 95 % of its means over 10 000 resamplings of the prompts.

    The same values in the same order give the same interval. Raises ValueError without a value.
    """
    if not len(values):
        raise ValueError("no prompt has a reward: there is nothing to average")
    x = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = [
        x[rng.integers(0, len(x), (min(_ROWS, _RESAMPLES - done), len(x)))].mean(1)
        for done in range(0, _RESAMPLES, _ROWS)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(x.mean()), float(low), float(high))
