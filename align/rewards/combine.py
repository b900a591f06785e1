"""What an ensemble makes of its members' scores: pure functions on [M, N], M members, N completions.

Coste et al. 2023, Reward Model Ensembles Help Mitigate Overoptimization, arXiv 2310.02743. Differs from the authors'
code (tlc4418/llm_optimization@416b03c): a coefficient of 0 is 0 (there it becomes 1), the divisor of the variance is a
setting (there the number of members for best-of-n and one less for PPO), and scores of one completion are told by its
place (there by its text, so that equal texts all get the first one's).

A score that is missing in one member, NaN or infinite, is missing in the ensemble: NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

Combine = Literal["mean", "worst", "uncertainty", "median"]


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the members [N] of scores [M, N]."""
    return _complete(scores, lambda known: known.mean(0))


def worst(scores: np.ndarray) -> np.ndarray:
    """The smallest of the members' scores [N]: worst-case optimisation, WCO."""
    return _complete(scores, lambda known: known.min(0))


def uncertainty(scores: np.ndarray, coefficient: float, ddof: int) -> np.ndarray:
    """Mean minus coefficient times the variance over the members [N]: uncertainty-weighted optimisation, UWO.

    coefficient: >= 0, in 1 / score; 0 is the mean. ddof: the variance is divided by M - ddof, 0 or 1; what is 0.5 with
    ddof 0 is 0.4 with ddof 1 for five members. Raises ValueError for others, and for one member with ddof 1.
    """
    check_uncertainty(coefficient, ddof, len(scores))
    return _complete(scores, lambda known: known.mean(0) - coefficient * known.var(0, ddof=ddof))


def median(scores: np.ndarray) -> np.ndarray:
    """Median over the members [N]; of an even number the mean of the two in the middle."""
    return _complete(scores, lambda known: np.median(known, 0))


def combined(scores: np.ndarray, combine: Combine, coefficient: float, ddof: int) -> np.ndarray:
    """One of the above [N] by its name; coefficient and ddof are read by uncertainty alone."""
    check_combine(combine)
    if combine == "uncertainty":
        return uncertainty(scores, coefficient, ddof)
    return {"mean": mean, "worst": worst, "median": median}[combine](scores)


def disagreement(scores: np.ndarray) -> np.ndarray:
    """Standard deviation over the members [N], divided by M: 0 where all agree."""
    return _complete(scores, lambda known: known.std(0))


def incomplete(scores: np.ndarray) -> np.ndarray:
    """Whether a completion lacks the score of a member [N] bool."""
    return np.logical_not(np.isfinite(_checked(scores)).all(0))


def check_combine(combine: str) -> None:
    """Raises ValueError for a name that is none of the ways to combine."""
    if combine not in get_args(Combine):
        raise ValueError(f"combine={combine}: must be one of {', '.join(get_args(Combine))}")


def check_uncertainty(coefficient: float, ddof: int, members: int) -> None:
    """Raises ValueError for settings under which `uncertainty` has no value."""
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient={coefficient}: must be a finite number, at least 0 (0: the mean)")
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof}: must be 0 (divide the variance by M) or 1 (by M - 1)")
    if members <= ddof:
        raise ValueError("ddof=1: one member has no variance; use ddof=0 or more members")


def aligned(answers: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Scores [M, N] in the order of the first member's answers, for members that each keep an order of their own.

    answers: of each member, N texts; scores: one each. Where all have the same order, answers are told by their place.
    Else equal texts are told by theirs among their equals: the k-th of one member is the k-th of the first. Raises
    ValueError unless all are about the same answers.
    """
    first = _occurrences(answers[0])
    rows = []
    for number, (texts, values) in enumerate(zip(answers, scores, strict=True), 1):
        if len(texts) != len(values):
            raise ValueError(f"member {number} has {len(values)} scores of {len(texts)} answers")
        known = dict(zip(_occurrences(texts), values, strict=True))
        if known.keys() != set(first):
            raise ValueError(f"member {number} is about other answers than member 1; score the same file with both")
        rows.append([known[key] for key in first])
    return np.asarray(rows, dtype=np.float64)


def _occurrences(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Each text with the number of its equals before it: no two are the same."""
    seen: Counter[str] = Counter()
    out = []
    for text in texts:
        out.append((text, seen[text]))
        seen[text] += 1
    return out


def _checked(scores: np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"scores must be [members, completions] with at least one member, found {values.shape}")
    return values


def _complete(scores: np.ndarray, rule: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The rule on the completions that every member has scored, NaN elsewhere."""
    values = _checked(scores)
    known = np.isfinite(values).all(0)
    out = np.full(values.shape[1], np.nan)
    if known.any():
        out[known] = rule(values[:, known])
    return out
