"""How often a policy ranks a chosen completion above its rejected one, and what could be expected of it.

Chen et al. 2024, arXiv 2405.19534 (ranking accuracy, idealised ranking accuracy, difficulty); Lin et al. 2024,
arXiv 2409.03650 (accuracy of DPO's implicit reward in and out of distribution). Pure functions on arrays; log-probs
are sums over completion tokens in nats, column 0 is chosen, column 1 rejected.

Ranking accuracy looks at the policy alone. Reward accuracy subtracts the reference: it is another number, and can be
high while the policy still ranks most pairs the wrong way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from align.evaluate.samples import Interval
from align.jsons import Json

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)  # the paper's grid for the idealised policy


@dataclass(frozen=True)
class RankingReport:
    """Shares of pairs with 95 % bootstrap intervals over pairs; None where no pair is concerned."""

    num_pairs: int
    ranking: Interval  # policy gives chosen at least the log-prob of rejected
    ranking_normalised: Interval  # the same per token
    reference_ranking: Interval
    reference_ranking_normalised: Interval
    reward: Interval | None  # log policy - log reference is larger for chosen; a tie is wrong. None: not asked for
    reward_minus_ranking: Interval | None  # paired
    num_wrong_before: int  # pairs that the reference ranks wrongly
    flipped: Interval | None  # share of those that the policy ranks rightly
    flipped_easy: Interval | None  # of those with difficulty c up to their median
    flipped_hard: Interval | None  # of the others
    num_agreement: int  # pairs whose raters' agreement is known
    ideal: tuple[tuple[float, Interval], ...]  # beta, share of those that an ideally trained policy ranks rightly
    reward_by_set: tuple[tuple[str, Interval], ...]  # reward accuracy of each set of pairs, in order of appearance
    ranking_normalised_by_set: tuple[tuple[str, Interval], ...]


def ranked(logps: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """Whether chosen has at least the log-prob of rejected, per token if lengths are given.

    logps, lengths: [P, 2]; returns [P] bool. A completion without tokens counts as one token long.
    """
    values = logps if lengths is None else logps / np.maximum(lengths, 1)
    return values[:, 0] >= values[:, 1]


def rewarded(policy_logps: np.ndarray, reference_logps: np.ndarray) -> np.ndarray:
    """Whether DPO's implicit reward, log policy - log reference, is larger for chosen; [P] bool, ties are wrong."""
    ratios = policy_logps - reference_logps
    return ratios[:, 0] > ratios[:, 1]


def ideal_log_ratio(reference_logps: np.ndarray, agreement: np.ndarray, beta: float) -> np.ndarray:
    """log pi*(chosen) / pi*(rejected) of the policy that minimises DPO's loss on infinitely many raters.

    reference_logps [P, 2], agreement [P]: the share of raters who prefer chosen, in [0.5, 1]; returns [P] nats,
    log ref(chosen) / ref(rejected) + log(agreement / (1 - agreement)) / beta, which is inf for full agreement.
    """
    if not ((agreement >= 0.5) & (agreement <= 1)).all():
        raise ValueError(f"agreement: must be in [0.5, 1], found {agreement.min():g} to {agreement.max():g}")
    with np.errstate(divide="ignore"):
        odds = np.log(agreement) - np.log1p(-agreement)
    return reference_logps[:, 0] - reference_logps[:, 1] + odds / beta


def ideally_ranked(reference_logps: np.ndarray, agreement: np.ndarray, beta: float) -> np.ndarray:
    """Whether the ideal policy ranks chosen above rejected; [P] bool."""
    return ideal_log_ratio(reference_logps, agreement, beta) > 0


def difficulty(reference_logps: np.ndarray) -> np.ndarray:
    """c = log ref(rejected) / ref(chosen), [P] nats: what a policy must make up to rank a pair rightly."""
    return reference_logps[:, 1] - reference_logps[:, 0]


def loss_threshold(reference_logps: np.ndarray, beta: float) -> np.ndarray:
    """-log s(beta c), [P]: DPO's sigmoid loss of a pair is at most this exactly if the pair is ranked rightly.

    Theorem 4.1 of 2405.19534. A pair the reference ranks wrongly (c > 0) needs a loss below ln 2.
    """
    return np.logaddexp(0, -beta * difficulty(reference_logps))


def ranking_report(
    policy_logps: np.ndarray,
    reference_logps: np.ndarray,
    lengths: np.ndarray,
    agreement: np.ndarray | None,
    sets: Sequence[str] | None = None,
    betas: Sequence[float] = BETAS,
    seed: int = 0,
    rewarded_by_reference: bool = True,
) -> RankingReport:
    """All of the above for P >= 1 pairs.

    policy_logps, reference_logps, lengths: [P, 2]. agreement: [P], NaN where it is not known; None: nowhere.
    sets: the name of each pair's set, e.g. in and out of distribution. The reference is the policy before training.
    rewarded_by_reference: whether training compared the policy with it; if not, neither its reward nor the ideal, which
    is DPO's, means anything, and they are left out.
    Raises ValueError for shapes and numbers that cannot be used.
    """
    policy, reference, counts = (np.asarray(a, dtype=float) for a in (policy_logps, reference_logps, lengths))
    num_pairs = len(policy)
    known = np.full(num_pairs, np.nan) if agreement is None else np.asarray(agreement, dtype=float)
    names = [""] * num_pairs if sets is None else list(sets)
    shapes = {policy.shape, reference.shape, counts.shape}
    if shapes != {(num_pairs, 2)} or num_pairs == 0 or known.shape != (num_pairs,) or len(names) != num_pairs:
        raise ValueError(
            "ranking: log-probs and lengths must be [P, 2], agreement and sets [P], P at least 1; found "
            f"{policy.shape}, {reference.shape}, {counts.shape}, {known.shape}, {len(names)}"
        )
    if not (np.isfinite(policy).all() and np.isfinite(reference).all()):
        bad = int((~np.isfinite(policy) | ~np.isfinite(reference)).any(1).argmax())
        raise ValueError(f"ranking: a log-prob of pair {bad} is not finite")
    rng = np.random.default_rng(seed)
    before, after, per_token = ranked(reference), ranked(policy), ranked(policy, counts)
    reward = rewarded(policy, reference) if rewarded_by_reference else None
    c = difficulty(reference)
    wrong = ~before
    easy = wrong & (c <= np.median(c[wrong])) if wrong.any() else wrong
    rated = ~np.isnan(known) & rewarded_by_reference
    ideal = [(float(b), ideally_ranked(reference[rated], known[rated], b)) for b in betas] if rated.any() else []
    return RankingReport(
        num_pairs=num_pairs,
        ranking=_share(after, rng),
        ranking_normalised=_share(per_token, rng),
        reference_ranking=_share(before, rng),
        reference_ranking_normalised=_share(ranked(reference, counts), rng),
        reward=None if reward is None else _share(reward, rng),
        reward_minus_ranking=None if reward is None else _mean(reward.astype(int) - after, rng),
        num_wrong_before=int(wrong.sum()),
        flipped=_share(after[wrong], rng) if wrong.any() else None,
        flipped_easy=_share(after[easy], rng) if easy.any() else None,
        flipped_hard=_share(after[wrong & ~easy], rng) if (wrong & ~easy).any() else None,
        num_agreement=int(rated.sum()),
        ideal=tuple((beta, _share(right, rng)) for beta, right in ideal),
        reward_by_set=() if reward is None else _by_set(reward, names, rng),
        ranking_normalised_by_set=_by_set(per_token, names, rng),
    )


def as_dict(report: RankingReport) -> Json:
    """For JSON."""
    out = asdict(report)
    out["ideal"] = [{"beta": beta, **asdict(share)} for beta, share in report.ideal]
    for key in ("reward_by_set", "ranking_normalised_by_set"):
        out[key] = {name: asdict(share) for name, share in getattr(report, key)}
    return out


def lines(report: RankingReport) -> list[str]:
    """The report for the terminal."""
    before = "the model before training" if report.reward is None else "the reference"
    out = [
        f"ranking: {report.num_pairs} pairs; shares with 95 % bootstrap intervals",
        f"ranking accuracy {_percent(report.ranking)}, of {before} {_percent(report.reference_ranking)}",
        f"ranking accuracy per token {_percent(report.ranking_normalised)}, of {before} "
        f"{_percent(report.reference_ranking_normalised)}",
    ]
    if report.reward is not None and report.reward_minus_ranking is not None:
        out.append(
            f"reward accuracy {_percent(report.reward)}, more than ranking accuracy by "
            f"{_percent(report.reward_minus_ranking)}"
        )
    if report.flipped is None:
        out.append(f"flipped: {before} ranks every pair rightly")
    else:
        halves = [
            f"{name} half {_percent(share)}"
            for name, share in (("easier", report.flipped_easy), ("harder", report.flipped_hard))
            if share is not None
        ]
        out.append(
            f"flipped {_percent(report.flipped)} of {report.num_wrong_before} pairs that {before} ranks wrongly: "
            + ", ".join(halves)
        )
    if report.reward is None:
        return out + [
            f"ranking accuracy per token on {name} {_percent(share)}"
            for name, share in report.ranking_normalised_by_set
        ]
    if report.ideal:
        shares = sorted(share.mean for _, share in report.ideal)
        betas = ", ".join(f"beta {beta:g} {_percent(share)}" for beta, share in report.ideal)
        out.append(
            f"ideal ranking accuracy, {report.num_agreement} pairs with agreement: min {shares[0]:.1%}, median "
            f"{np.median(shares):.1%}, max {shares[-1]:.1%} ({betas})"
        )
    else:
        out.append("ideal ranking accuracy: needs the raters' agreement; no pair has one")
    out += [f"reward accuracy on {name} {_percent(share)}" for name, share in report.reward_by_set]
    return out


def _percent(share: Interval) -> str:
    return f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _by_set(right: np.ndarray, names: Sequence[str], rng: np.random.Generator) -> tuple[tuple[str, Interval], ...]:
    return tuple((name, _share(right[[n == name for n in names]], rng)) for name in dict.fromkeys(names) if name)


def _share(right: np.ndarray, rng: np.random.Generator) -> Interval:
    return _mean(right.astype(int), rng)


def _mean(values: np.ndarray, rng: np.random.Generator) -> Interval:
    """Mean of P numbers with few distinct values, resampling pairs 10 000 times.

    A resample is known by how often each distinct value is in it, so the pairs themselves are not drawn: memory does
    not grow with P.
    """
    distinct, counts = np.unique(values, return_counts=True)
    means = rng.multinomial(len(values), counts / len(values), 10_000) @ distinct / len(values)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
