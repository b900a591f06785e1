"""Best-of-n: which of n completions is taken, and what is to be expected of it, from N >= n scored ones.

The proxy selects, the gold reward judges. Nothing here draws: the expectation over all subsets of n of the N is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Scores = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class BestOfN:
    """Expected scores of the completion with the highest proxy among n, mean over prompts."""

    n: np.ndarray  # [K] int64
    proxy: np.ndarray  # [K]
    gold: np.ndarray  # [K]
    kl: np.ndarray  # [K] nats, kl_bound
    proxy_by_prompt: np.ndarray  # [Q, K]
    gold_by_prompt: np.ndarray  # [Q, K]


def select(scores: Sequence[float]) -> int:
    """Place of the highest score, of equal ones the lowest; a missing score (NaN) is not taken.

    Raises ValueError if none is known.
    """
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).all():
        raise ValueError("no completion has a score: there is no best one")
    return int(np.nanargmax(values))  # the first of equal ones


def kl_bound(n: int | np.ndarray) -> np.ndarray:
    """KL(best-of-n policy || policy) in nats, log n - (n - 1) / n.

    Exact where no two completions have the same proxy score, else an upper bound; Beirami et al. 2024, Theoretical
    guarantees on the best-of-n alignment policy, arXiv 2401.01879.
    """
    n = np.asarray(n, dtype=np.float64)
    return np.log(n) - (n - 1) / n


def rank_weights(num_samples: int, n: int) -> np.ndarray:
    """Probability of each rank [N], the lowest first, to be the highest of n drawn without replacement.

    C(i - 1, n - 1) / C(N, n) for i = 1 .. N. By the ratio of neighbours, w_i / w_(i+1) = (i - n + 1) / i from
    w_N = n / N: the binomials themselves overflow at N = 1030.
    """
    if not 1 <= n <= num_samples:
        raise ValueError(f"best of {n} among {num_samples} completions: n must be from 1 to their number; draw more")
    i = np.arange(num_samples - 1, n - 1, -1, dtype=np.float64)  # N - 1 .. n
    known = np.concatenate([[n / num_samples], n / num_samples * np.cumprod((i - n + 1) / i)])
    out = np.zeros(num_samples)
    out[n - 1 :] = known[::-1]
    return out


def best_of_n(proxy: Sequence[_Scores], gold: Sequence[_Scores], ns: Sequence[int]) -> BestOfN:
    """Unbiased estimate for each n of the scores of the best of n by proxy, from N completions of each of Q prompts.

    proxy, gold: [Q][N], in any order, N may differ between prompts; ns: 1 <= n <= the smallest N. With proxy ascending,
    sum over i of C(i - 1, n - 1) / C(N, n) gold_(i): the mean over all subsets of n. Completions of equal proxy score
    count by their mean gold, as if drawn lots for: the order of the completions changes nothing. Nakano et al. 2021,
    WebGPT, appendix I; arXiv 2112.09332. Raises ValueError for scores that are missing or no finite numbers.
    """
    if len(proxy) == 0 or len(ns) == 0:
        raise ValueError("best of n: there must be at least one prompt and one n")
    curves: dict[str, list[np.ndarray]] = {"proxy": [], "gold": []}
    tables: dict[int, np.ndarray] = {}  # by N: [K, N]
    for q, (p, g) in enumerate(zip(proxy, gold, strict=True)):
        p, g = np.asarray(p, dtype=np.float64), np.asarray(g, dtype=np.float64)
        if p.shape != g.shape or p.ndim != 1 or not (np.isfinite(p).all() and np.isfinite(g).all()):
            raise ValueError(f"prompt {q}: every completion needs a finite proxy and a finite gold score")
        if len(p) not in tables:
            tables[len(p)] = np.stack([rank_weights(len(p), int(n)) for n in ns])
        values, tie, count = np.unique(p, return_inverse=True, return_counts=True)
        of_tie = np.add.reduceat(tables[len(p)], np.cumsum(count) - count, axis=1)  # [K, ties], their ranks' weights
        curves["proxy"].append(of_tie @ values)
        curves["gold"].append(of_tie @ (np.bincount(tie, g) / count))
    by_prompt = {name: np.stack(rows) for name, rows in curves.items()}
    n = np.asarray([int(n) for n in ns], dtype=np.int64)
    return BestOfN(
        n, by_prompt["proxy"].mean(0), by_prompt["gold"].mean(0), kl_bound(n), by_prompt["proxy"], by_prompt["gold"]
    )


def powers_of_two(num_samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples."""
    return [2**k for k in range(num_samples.bit_length())]
