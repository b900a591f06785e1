"""What differences of scores claim as probabilities, and how far that is true; intervals over prompts for all of it.

A difference d = (score of chosen - score of rejected) / tau says that chosen wins with probability s(d), s the logistic
function. Arrays of P pairs; no model here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from align.evaluate.samples import Interval
from align.jsons import Json

_RESAMPLES = 10_000
_CELLS = 2_000_000  # resampled counts held in memory at the same time
_DRAW_COST = 4  # a multinomial's draw of one count, in draws of one prompt
_STEPS = 100  # of Newton's method; it takes about ten
_ROUNDING = 1e-12  # a step that changes the loss by less is near the minimum and must not be cut short


# ---------------------------------------------------------------------- intervals


def resampled_sums(columns: np.ndarray, prompts: Sequence[str] | None, seed: int, stream: str = "") -> np.ndarray:
    """Sums of the columns over 10 000 resamplings of the prompts, all pairs of a prompt together; [10 000, columns].

    columns: [P, columns]. prompts: what the pairs share, None: each has its own. Other streams draw independently.
    """
    sums = np.asarray(columns, dtype=float)
    if prompts is not None:
        _, index = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
        by_prompt = np.zeros((index.max() + 1, sums.shape[1]))
        np.add.at(by_prompt, index, sums)
        sums = by_prompt
    num_prompts = len(sums)
    # prompts with equal sums are drawn as one: shares of right pairs have few distinct sums, however many prompts
    distinct, counts = np.unique(sums, axis=0, return_counts=True)
    few = len(distinct) * _DRAW_COST < num_prompts
    rng = np.random.default_rng([seed, zlib.crc32(stream.encode())])
    at_once = max(1, _CELLS // (len(distinct) if few else num_prompts))
    parts = []
    for done in range(0, _RESAMPLES, at_once):
        n = min(at_once, _RESAMPLES - done)
        if few:
            parts.append(rng.multinomial(num_prompts, counts / num_prompts, n) @ distinct)
        else:
            picks = rng.integers(0, num_prompts, (n, num_prompts)) + num_prompts * np.arange(n)[:, None]
            parts.append(np.bincount(picks.ravel(), minlength=n * num_prompts).reshape(n, num_prompts) @ sums)
    return np.concatenate(parts)


def interval(value: float, draws: np.ndarray) -> Interval:
    """A value with the central 95 % of its resampled values; those that are not a number are left out."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return Interval(float(value), float(value), float(value))
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def over_prompts(values: np.ndarray, prompts: Sequence[str] | None, seed: int = 0, stream: str = "") -> Interval:
    """Mean of P >= 1 values, one a pair, with its interval over prompts (a mean over pairs in every resample)."""
    x = np.asarray(values, dtype=float)
    draws = mean_draws(x, prompts, seed, stream)
    return interval(float(x.mean()), draws)


def mean_draws(values: np.ndarray, prompts: Sequence[str] | None, seed: int, stream: str = "") -> np.ndarray:
    """The 10 000 resampled means that `over_prompts` takes its interval from."""
    sums = resampled_sums(np.stack([values, np.ones(len(values))], axis=1), prompts, seed, stream)
    return sums[:, 0] / sums[:, 1]


# ---------------------------------------------------------------------- probabilities


def log_losses(differences: np.ndarray) -> np.ndarray:
    """-log s(d) of each pair in nats, [P]; ln 2 for a tie."""
    return np.logaddexp(0.0, -differences)


def probabilities(differences: np.ndarray) -> np.ndarray:
    """s(d) of each pair, [P]."""
    return np.exp(-np.logaddexp(0.0, -differences))


def reliability(differences: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair: its bin, the confidence max(s(d), 1 - s(d)), and whether the side it prefers is chosen.

    Chosen is always the better one, so s(d) has nothing to be compared with; the preferred side has. Bins have equal
    width over [0.5, 1]. A tie prefers both sides by one half, and is half right.
    """
    confidence = probabilities(np.abs(differences))
    right = np.where(differences == 0, 0.5, (differences > 0).astype(float))
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    return bins, confidence, right


def fitted_temperature(differences: np.ndarray) -> float | None:
    """The t > 0 that minimises the mean of -log s(d / t); None if no finite one does.

    Convex in 1 / t, by Newton's method with halved steps. None if no pair is wrong (t would go to 0) or if the mean
    difference is not above 0 (t would go to infinity). Guo et al. 2017, temperature scaling; arXiv 1706.04599.
    """
    d = np.asarray(differences, dtype=float)
    if d.mean() <= 0 or d.min() >= 0:
        return None
    d = d / np.abs(d).max()  # the step from 0 is of the same order for scores of every size
    scale = 0.0
    loss = float(log_losses(scale * d).mean())
    for _ in range(_STEPS):
        wrong = probabilities(-scale * d)
        step = float((wrong * d).mean() / (wrong * (1 - wrong) * d * d).mean())
        while (tried := float(log_losses((scale + step) * d).mean())) > loss * (1 + _ROUNDING):
            step /= 2
        scale, loss = scale + step, tried
        if abs(step) <= 1e-12 * scale:
            break
    return float(np.abs(differences).max() / scale)


def calibration(
    differences: np.ndarray,
    prompts: Sequence[str] | None,
    num_bins: int,
    fit_temperature: bool,
    seed: int = 0,
) -> Json:
    """Log loss, Brier score, expected calibration error and the bins they come from, of P >= 1 pairs.

    brier: mean (1 - s(d))^2, 0.25 for ties. ece: sum over bins of share * |accuracy - mean confidence|; with few pairs
    in a bin it is above 0 for a calibrated model too, and so is its interval. fit_temperature: the same for d / t, each
    half of the prompts with the t of the other half, so that no pair is judged by a t that saw it. temperature is the
    one fitted to all pairs; null, and no fitted numbers, where no finite t is best.
    """
    d = np.asarray(differences, dtype=float)
    out = _scores(d, prompts, num_bins, seed)
    if fit_temperature:
        fitted = _cross_fitted(d, prompts, seed)
        out["temperature"] = fitted_temperature(d)
        if fitted is not None:
            out["fitted"] = _scores(fitted, prompts, num_bins, seed)
    return out


def _scores(d: np.ndarray, prompts: Sequence[str] | None, num_bins: int, seed: int) -> Json:
    bins, confidence, right = reliability(d, num_bins)
    columns = np.zeros((len(d), num_bins + 1))
    columns[np.arange(len(d)), bins] = right - confidence
    columns[:, num_bins] = 1
    error: Callable[[np.ndarray], np.ndarray] = lambda s: np.abs(s[:, :-1]).sum(1) / s[:, -1]  # noqa: E731
    value = float(error(columns.sum(0, keepdims=True))[0])
    named = None if prompts is None else np.asarray(prompts, dtype=object)
    rows = []
    for i in np.unique(bins):
        here = bins == i
        accuracy = over_prompts(right[here], None if named is None else named[here].tolist(), seed, f"bin {i}")
        rows.append(
            {
                "low": 0.5 + i / (2 * num_bins),
                "high": 0.5 + (i + 1) / (2 * num_bins),
                "count": int(here.sum()),
                "confidence": float(confidence[here].mean()),
                "accuracy": as_json(accuracy),
            }
        )
    return {
        "log_loss": as_json(over_prompts(log_losses(d), prompts, seed)),
        "brier": as_json(over_prompts(probabilities(-d) ** 2, prompts, seed, "brier")),
        "ece": as_json(interval(value, error(resampled_sums(columns, prompts, seed, "ece")))),
        "bins": rows,
    }


def _cross_fitted(d: np.ndarray, prompts: Sequence[str] | None, seed: int) -> np.ndarray | None:
    """d / t with the t of the other half of the prompts; None if a half has no finite one."""
    names = [str(i) for i in range(len(d))] if prompts is None else [str(p) for p in prompts]
    unique = list(dict.fromkeys(names))
    order = np.random.default_rng(seed).permutation(len(unique))
    half = {unique[i]: bool(rank % 2) for rank, i in enumerate(order)}
    second = np.array([half[name] for name in names])
    if second.all() or not second.any():
        return None
    t_first, t_second = fitted_temperature(d[~second]), fitted_temperature(d[second])
    if t_first is None or t_second is None:
        return None
    return np.where(second, d / t_first, d / t_second)


def as_json(value: Interval) -> dict[str, float]:
    """An interval for JSON."""
    return {"mean": value.mean, "low": value.low, "high": value.high}


# ---------------------------------------------------------------------- logistic regression


def logistic(features: np.ndarray, ridge: float, prompts: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients w that minimise sum of -log s(x w) + ridge / 2 |w|^2, and their covariance; [F] and [F, F].

    features [P, F]: chosen minus rejected. A pair seen from the other side has features -x and the other label, hence
    the same loss: neither labels nor an intercept are needed. ridge > 0: the minimum is finite even where no pair is
    wrong. Newton's method (iteratively reweighted least squares) with halved steps. The covariance is the sandwich
    H^-1 (sum over prompts of g g') H^-1 with g a prompt's gradient: pairs of one prompt may depend on each other.
    """
    x = np.asarray(features, dtype=float)
    penalty = ridge * np.eye(x.shape[1])
    w = np.zeros(x.shape[1])

    def objective(w: np.ndarray) -> float:
        return float(log_losses(x @ w).sum() + ridge / 2 * w @ w)

    value = objective(w)
    for _ in range(_STEPS):
        wrong = probabilities(-(x @ w))
        hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x + penalty
        step = np.linalg.solve(hessian, x.T @ wrong - ridge * w)
        while (tried := objective(w + step)) > value * (1 + _ROUNDING):
            step = step / 2
        w, value = w + step, tried
        if np.abs(step).max() <= 1e-10 * max(1.0, float(np.abs(w).max())):
            break
    wrong = probabilities(-(x @ w))
    hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x + penalty
    gradients = x * wrong[:, None]
    if prompts is not None:
        _, index = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
        by_prompt = np.zeros((index.max() + 1, x.shape[1]))
        np.add.at(by_prompt, index, gradients)
        gradients = by_prompt
    inverse = np.linalg.inv(hessian)
    return w, inverse @ (gradients.T @ gradients) @ inverse
