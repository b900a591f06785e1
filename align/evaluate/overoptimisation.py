"""What optimising a proxy does to the gold reward: both laws, their fits, and the curves of best-of-n.

Gao, Schulman and Hilton 2022, Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760. d is the square root of
KL(policy || initial policy) in nats of a whole completion, R the gold reward less that of the initial policy:

    bon  R = d (alpha - beta d)       peak at d = alpha / (2 beta)
    rl   R = d (alpha - beta ln d)    peak at d = exp(alpha / beta - 1)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from align.data.sources import BadRow, locate_all, read
from align.evaluate.best_of_n import best_of_n, kl_bound, powers_of_two
from align.evaluate.passk import bootstrap
from align.evaluate.samples import Interval
from align.files import write_atomic
from align.jsons import Fields, Json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Law = Literal["bon", "rl"]
Estimator = Literal["k1", "k2", "k3"]

MIN_DISTANCE = (
    0.1  # sqrt nats: nearer to the initial policy the noise of R / d grows without bound; best-of-2 is at 0.44
)
# two-sided 95 % points of Student's t for 1 .. 30 degrees of freedom
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """Where a law is highest."""

    distance: float  # sqrt nats
    reward: float


@dataclass(frozen=True)
class Fit:
    """A law fitted to points."""

    law: Law
    alpha: float
    beta: float
    rms: float  # of the fitted rewards, in their unit
    num_points: int
    num_dropped: int  # too near to the initial policy
    peak: Peak | None  # None: the law has none at a positive finite distance


@dataclass(frozen=True)
class Pool:
    """The scored completions of one prompt."""

    seed: str  # of the training that made the proxies; "": one for all
    proxies: Mapping[str, np.ndarray]  # name -> [N]
    gold: np.ndarray  # [N]


def law_rewards(law: Law, d: object, alpha: float, beta: float) -> np.ndarray:
    """R at distances d >= 0, 0 at 0."""
    d = np.asarray(d, dtype=np.float64)
    return d * (alpha - beta * _regressor(law, d))


def _regressor(law: Law, d: np.ndarray) -> np.ndarray:
    """What R / d is linear in. At d = 0 of rl 0: d ln d goes to 0 there."""
    if law not in get_args(Law):
        raise ValueError(f"law={law}: must be one of {', '.join(get_args(Law))}")
    return d if law == "bon" else np.log(np.where(d > 0, d, 1.0))


def peak(law: Law, alpha: float, beta: float) -> Peak | None:
    """Where R is highest: bon (alpha / 2 beta, alpha^2 / 4 beta), rl (d = exp(alpha / beta - 1), beta d).

    None if that is at no positive finite distance: R never falls (beta <= 0), or of bon never rises (alpha <= 0).
    """
    if beta <= 0 or (law == "bon" and alpha <= 0):
        return None
    if law == "bon":
        found = Peak(alpha / (2 * beta), alpha**2 / (4 * beta))
    else:
        exponent = alpha / beta - 1
        d = math.exp(exponent) if exponent < 700 else math.inf
        found = Peak(d, beta * d)
    return found if 0 < found.distance < math.inf and found.reward < math.inf else None


def fit(law: Law, d: object, rewards: object, min_distance: float = MIN_DISTANCE) -> Fit:
    """The law nearest to the points by least squares on R / d, which is linear in d (bon) or ln d (rl).

    d, rewards: [K], rewards less that of the initial policy. Points nearer than min_distance are left out. Raises
    ValueError for fewer than two distances.
    """
    d, rewards = np.asarray(d, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    if d.shape != rewards.shape or d.ndim != 1 or not (np.isfinite(d).all() and np.isfinite(rewards).all()):
        raise ValueError("fit: distances and rewards must be two lists of finite numbers of the same length")
    if not min_distance > 0:
        raise ValueError(f"min_distance={min_distance}: must be greater than 0")
    far = d >= min_distance
    if len(np.unique(d[far])) < 2:
        raise ValueError(f"fit: needs points at two distances of at least {min_distance:g}, found {d[far].tolist()}")
    columns = np.stack([np.ones(far.sum()), -_regressor(law, d[far])], 1)
    alpha, beta = (float(x) for x in np.linalg.lstsq(columns, rewards[far] / d[far], rcond=None)[0])
    errors = law_rewards(law, d[far], alpha, beta) - rewards[far]
    rms = float(np.sqrt(np.mean(errors**2)))
    return Fit(law, alpha, beta, rms, int(far.sum()), int((~far).sum()), peak(law, alpha, beta))


def sequence_kl(log_ratios: object, mask: object, estimator: Estimator) -> float:
    """Estimate of KL(policy || initial policy) in nats a completion, mean over completions of the sum over tokens.

    log_ratios [B, T]: log policy - log initial policy of tokens that the policy drew; mask [B, T]: its tokens. With d a
    log-ratio: k1 = d and k3 = exp(-d) + d - 1 are unbiased, k2 = d^2 / 2 is not (Schulman 2020, Approximating KL
    Divergence). Differs from tlc4418/llm_optimization@416b03c, whose k3 is exp(d) - 1 - d: that needs samples of the
    initial policy.
    """
    d = np.where(np.asarray(mask, dtype=bool), np.asarray(log_ratios, dtype=np.float64), 0.0)  # each is 0 at 0
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator={estimator}: must be one of {', '.join(get_args(Estimator))}")
    values = {"k1": lambda: d, "k2": lambda: d**2 / 2, "k3": lambda: np.expm1(-d) + d}[estimator]()
    return float(values.sum(1).mean())


def read_rows(train: object) -> Iterator[tuple[str, Fields]]:
    """Rows and their places, for `pools`, of the file or list of files that data.train names."""
    for source in locate_all(train, "data.train"):
        for place, found in read(source):
            if isinstance(found, BadRow):
                raise ValueError(f"{place}: {found}")
            yield place, found


def pools(rows: Iterable[tuple[str, Fields]]) -> tuple[list[Pool], int]:
    """Pools of rows (place, {prompt, completions: [{text, proxy: {name: score}, gold: score}], seed?}).

    A completion without one of its scores (null) is left out of all curves; their number is the second result. Raises
    ValueError that names the place of what cannot be used.
    """
    found: list[Pool] = []
    left_out = 0
    names: tuple[str, ...] | None = None
    for place, row in rows:
        completions = row.get("completions")
        if not isinstance(completions, list) or not completions:
            raise ValueError(f"{place}: completions must be a list with at least one completion")
        scores = [_scores(place, k, c) for k, c in enumerate(completions, 1)]
        names = names or tuple(scores[0][0])
        for k, (proxy, _) in enumerate(scores, 1):
            if set(proxy) != set(names):
                raise ValueError(
                    f"{place}: completion {k} has the proxies {sorted(proxy)}, the first one has {sorted(names)}"
                )
        table = np.array([[gold, *(proxy[name] for name in names)] for proxy, gold in scores])  # [N, 1 + names]
        known = ~np.isnan(table).any(1)
        left_out += int((~known).sum())
        if not known.any():
            raise ValueError(f"{place}: no completion has all of its scores")
        columns = table[known].T
        found.append(Pool(str(row.get("seed", "")), dict(zip(names, columns[1:], strict=True)), columns[0]))
    if not found:
        raise ValueError("no rows: there is nothing to draw")
    return found, left_out


def _scores(place: str, number: int, completion: Any) -> tuple[dict[str, float], float]:
    """Proxy scores by name and the gold score of a completion, NaN for null."""
    proxy = completion.get("proxy") if isinstance(completion, Mapping) else None
    if not isinstance(proxy, Mapping) or not proxy or "gold" not in completion:
        raise ValueError(f'{place}: completion {number} must hold "proxy": {{name: score}} and "gold": score')
    for name, value in (*proxy.items(), ("gold", completion["gold"])):
        number_or_null = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if not number_or_null or (value is not None and not math.isfinite(value)):
            raise ValueError(f"{place}: completion {number}: {name} is {value!r}, must be a finite number or null")
    known = {str(name): math.nan if value is None else float(value) for name, value in proxy.items()}
    return known, math.nan if completion["gold"] is None else float(completion["gold"])


def report(
    rows: Iterable[tuple[str, Fields]],
    ns: Sequence[int] | None = None,
    min_distance: float = MIN_DISTANCE,
) -> Json:
    """The best-of-n curves of every named proxy with their fits and peaks, ready for JSON; the first is the baseline.

    rows: see `pools`. ns: ascending, None: powers of two up to the smallest number of completions of a prompt; 1 is
    always among them. Gold is scaled to mean 0 and variance 1 over all completions, each proxy over those of its seed
    (ddof 0); curves are less their value at n = 1. Means are over prompts, then over seeds. Intervals: of several seeds
    Student's over seeds, of one the bootstrap over its prompts, of one prompt none.
    """
    found, left_out = pools(rows)
    smallest = min(len(p.gold) for p in found)
    n = sorted({1, *(powers_of_two(smallest) if ns is None else ns)})
    if n[0] < 1 or n[-1] > smallest:
        raise ValueError(f"n={n[0] if n[0] < 1 else n[-1]}: must be from 1 to {smallest}, the fewest completions")
    gold_mean, gold_std = _scale([p.gold for p in found])
    if gold_std == 0:
        raise ValueError("gold is the same for all completions: there is nothing to draw")
    seeds = {seed: [p for p in found if p.seed == seed] for seed in dict.fromkeys(p.seed for p in found)}
    distance = np.sqrt(kl_bound(np.array(n)))
    units = {name: _units(name, seeds, n, (gold_mean, gold_std)) for name in found[0].proxies}
    first = next(iter(units))
    curves = {}
    for name, unit in units.items():
        curves[name] = _curve(n, distance, unit, len(seeds), min_distance)
        if name != first:
            curves[name]["gold_minus_first"] = _intervals(unit["gold"] - units[first]["gold"], len(seeds))
    return {
        "num_prompts": len(found),
        "num_seeds": len(seeds),
        "num_completions": sum(len(p.gold) for p in found),
        "left_out": left_out,
        "intervals": "seeds" if len(seeds) > 1 else "prompts" if len(found) > 1 else None,
        "gold_scale": {"mean": gold_mean, "std": gold_std},
        "min_distance": min_distance,
        "first": first,
        "n": n,
        "kl": kl_bound(np.array(n)).tolist(),
        "distance": distance.tolist(),
        "curves": curves,
    }


def _scale(scores: Sequence[np.ndarray]) -> tuple[float, float]:
    together = np.concatenate(scores)
    spread = 0.0 if np.ptp(together) == 0 else float(together.std())  # of equal numbers rounding can leave some
    return float(together.mean()), spread


def _units(
    name: str, seeds: Mapping[str, list[Pool]], n: Sequence[int], gold_scale: tuple[float, float]
) -> dict[str, np.ndarray]:
    """What intervals are taken over, [U, K] of proxy and gold: the seeds, or the prompts of the only one."""
    parts: dict[str, list[np.ndarray]] = {"proxy": [], "gold": []}
    for held in seeds.values():
        mean, std = _scale([p.proxies[name] for p in held])
        proxies = [(p.proxies[name] - mean) / (std or 1.0) for p in held]
        result = best_of_n(proxies, [(p.gold - gold_scale[0]) / gold_scale[1] for p in held], n)
        for key, values in (("proxy", result.proxy_by_prompt), ("gold", result.gold_by_prompt)):
            less_start = values - values[:, :1]  # n[0] is 1
            parts[key].append(less_start.mean(0, keepdims=True) if len(seeds) > 1 else less_start)
    return {key: np.concatenate(values) for key, values in parts.items()}


def _curve(
    n: Sequence[int], distance: np.ndarray, unit: dict[str, np.ndarray], num_seeds: int, min_distance: float
) -> Json:
    """One proxy's part of the report."""
    gold = unit["gold"].mean(0)
    top = int(np.argmax(gold))
    fits: Json | None = None
    if (distance >= min_distance).sum() >= 2:
        fits = {}
        for law in get_args(Law):
            fits[law] = asdict(fit(law, distance, gold, min_distance))
            if num_seeds > 1:
                each = [fit(law, distance, values, min_distance) for values in unit["gold"]]
                fits[law] |= {"alpha_by_seed": [f.alpha for f in each], "beta_by_seed": [f.beta for f in each]}
    return {
        "gold": _intervals(unit["gold"], num_seeds),
        "proxy": _intervals(unit["proxy"], num_seeds),
        "measured_peak": {"n": n[top], "distance": float(distance[top]), "gold": float(gold[top])},
        "lost_after_peak": float(gold[top] - gold[-1]),
        "fits": fits,
    }


def _intervals(values: np.ndarray, num_seeds: int) -> list[dict[str, float | None]]:
    """Mean of each column of [U, K] with its 95 % interval; low and high are None for U = 1."""
    out: list[dict[str, float | None]] = []
    for column in values.T:
        if len(column) == 1:
            out.append({"mean": float(column[0]), "low": None, "high": None})
        else:
            out.append(asdict(student(column) if num_seeds > 1 else bootstrap(column)))
    return out


def student(values: object) -> Interval:
    """Mean of two or more independent values and its 95 % interval by Student's t: for a handful of seeds, where a
    bootstrap is too narrow."""
    x = np.asarray(values, dtype=np.float64)
    freedom = len(x) - 1
    if freedom < 1:
        raise ValueError("an interval over seeds needs at least two of them")
    # beyond the table two terms of the expansion in 1 / freedom, right to 0.0002
    z = 1.959964
    expanded = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t = _T[freedom - 1] if freedom <= len(_T) else expanded
    half = t * float(x.std(ddof=1)) / math.sqrt(len(x))
    mean = float(x.mean())
    return Interval(mean, mean - half, mean + half)


def lines(data: Fields) -> list[str]:
    """For people: of each proxy the gold at the largest n, where it was highest, and the difference to the first."""
    of = "" if data["intervals"] is None else f"; 95 % intervals over {data['intervals']}"
    out = [
        f"{data['num_completions']} completions of {data['num_prompts']} prompts, {data['num_seeds']} seeds, "
        f"{data['left_out']} without all scores left out{of}"
    ]
    for name, curve in data["curves"].items():
        last, top = curve["gold"][-1], curve["measured_peak"]
        line = f"{name}: gold {_shown(last)} at n={data['n'][-1]}, highest {top['gold']:+.3f} at n={top['n']}"
        if name != data["first"]:
            line += f"; less {data['first']} {_shown(curve['gold_minus_first'][-1])}"
        out.append(line)
    return out


def _shown(value: Mapping[str, float | None]) -> str:
    interval = "" if value["low"] is None else f" [{value['low']:+.3f}, {value['high']:+.3f}]"
    return f"{value['mean']:+.3f}{interval}"


def write(data: Fields, out: str | Path, title: str = "Best-of-n") -> tuple[Path, Path]:
    """What `report` returned as overoptimisation.json and .png in the directory `out`, which is made; returns both.

    Raises RuntimeError without matplotlib, before anything is written.
    """
    figure = _figure(data, title)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    text, picture = directory / "overoptimisation.json", directory / "overoptimisation.png"
    scratch = directory / ".overoptimisation.png.tmp"
    try:
        # without the version of matplotlib in it: the same data give the same file
        figure.savefig(scratch, format="png", dpi=150, metadata={"Software": None})
        write_atomic(text, json.dumps(data, indent=1, allow_nan=False) + "\n")
        os.replace(scratch, picture)
    finally:
        scratch.unlink(missing_ok=True)
    return text, picture


def _figure(data: Fields, title: str) -> Figure:
    """Gold (solid, with its interval), proxy (dashed) and the fitted law (dotted) against sqrt KL; a point at the
    measured peak of gold, a cross at the fitted one where the curves reach it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("matplotlib is not installed, which the plot needs: pip install matplotlib") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    d = np.array(data["distance"])
    for k, (name, curve) in enumerate(data["curves"].items()):
        colour = f"C{k % 10}"
        axes.plot(d, [v["mean"] for v in curve["proxy"]], "--", color=colour, linewidth=1)
        axes.plot(d, [v["mean"] for v in curve["gold"]], "-", color=colour, label=name)
        if data["intervals"] is not None:
            low, high = ([v[side] for v in curve["gold"]] for side in ("low", "high"))
            axes.fill_between(d, low, high, color=colour, alpha=0.15, linewidth=0)
        measured = curve["measured_peak"]
        axes.plot(measured["distance"], measured["gold"], "o", color=colour)
        law = curve["fits"] and curve["fits"]["bon"]
        if law:
            grid = np.linspace(0, d[-1], 200)
            axes.plot(grid, law_rewards("bon", grid, law["alpha"], law["beta"]), ":", color=colour, linewidth=1)
            if law["peak"] and law["peak"]["distance"] <= d[-1]:
                axes.plot(law["peak"]["distance"], law["peak"]["reward"], "x", color=colour)
    for style, label in (("-", "gold"), ("--", "proxy"), (":", "fit of gold, d (alpha - beta d)")):
        axes.plot([], [], style, color="grey", label=label)
    axes.set_xlabel("square root of KL = log n - (n - 1) / n (nats)")
    axes.set_ylabel("score less that of n = 1 (standard deviations)")
    axes.set_title(title)
    axes.legend(fontsize="small")
    return figure
