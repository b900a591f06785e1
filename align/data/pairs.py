"""Pair construction: scored samples of a prompt to rows of chosen and rejected.

A rule sees the numbers of one prompt's samples and says which two make a pair; it is pure, and its random draws
depend on the seed and the prompt alone. Everything else (dropping, counting, capping, writing) is the same for all
rules. Reading is scored.py's, what a preference row means is formats.py's.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from align.data.scored import Sample, Scored, file_and_origin, read_scored
from align.files import atomic_writer
from align.jsons import Json

Pick = tuple[int, int]  # chosen, rejected: places among the samples of a prompt

# Deviations from the mean, in population standard deviations; min and max are beyond all of them.
_DEVIATIONS = {
    "min": -np.inf,
    "mu-2sigma": -2.0,
    "mu-sigma": -1.0,
    "mu": 0.0,
    "mu+sigma": 1.0,
    "mu+2sigma": 2.0,
    "max": np.inf,
}


@dataclass(frozen=True)
class Candidates:
    """What a rule may know of the G >= 2 samples of a prompt that have a score, in the order of the files."""

    scores: np.ndarray  # [G] float64, finite; higher is better
    lengths: np.ndarray  # [G] tokens if all samples know theirs, else characters
    origins: tuple[str, ...]  # [G]
    seed: int  # of this prompt: from the run's seed and the prompt

    @property
    def best(self) -> int:
        """The first sample with the highest score."""
        return int(self.scores.argmax())

    def rng(self) -> np.random.Generator:
        """A fresh generator: the same draws for the same prompt and seed."""
        return np.random.default_rng(self.seed)


class PairRule(ABC):
    """Which samples of a prompt make pairs."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Sequence[Pick]:
        """The pairs, chosen with the higher score; samples of equal score or equal text are left out afterwards."""


def nearest(scores: np.ndarray, anchor: str) -> int:
    """The sample whose score is nearest to an anchor such as mu-2sigma; the first on ties. scores: [G].

    sigma is the population's (divided by G).
    """
    if anchor in ("min", "max"):
        return int(scores.argmin() if anchor == "min" else scores.argmax())
    return int(np.abs(scores - (scores.mean() + _DEVIATIONS[anchor] * scores.std())).argmin())


@dataclass(frozen=True)
class MaxMin(PairRule):
    """Best against worst; the first on ties."""

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """One pair."""
        return [(candidates.best, int(candidates.scores.argmin()))]


@dataclass(frozen=True)
class SweetSpot(PairRule):
    """The samples nearest to two anchors of the scores: min, mu-2sigma, mu-sigma, mu, mu+sigma, mu+2sigma, max.

    Paper's best: chosen=max, rejected=mu-2sigma. Xiao et al. 2025, arXiv 2502.16825. The authors' selection code is
    not published: population sigma and the first sample on ties are our conventions.
    """

    chosen: str
    rejected: str

    def __post_init__(self) -> None:
        for key, value in (("chosen", self.chosen), ("rejected", self.rejected)):
            if value not in _DEVIATIONS:
                raise ValueError(f"pairs.{key}={value}: must be one of {', '.join(_DEVIATIONS)}")
        if _DEVIATIONS[self.chosen] <= _DEVIATIONS[self.rejected]:
            raise ValueError(
                f"pairs.chosen={self.chosen}: must be above pairs.rejected={self.rejected} in {', '.join(_DEVIATIONS)}"
            )

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """One pair, of one sample twice if it is nearest to both anchors."""
        return [(nearest(candidates.scores, self.chosen), nearest(candidates.scores, self.rejected))]


@dataclass(frozen=True)
class MinOfK(PairRule):
    """Best of all against the worst of the first k: the scalable rule of arXiv 2502.16825 (k = 5).

    Not the same as mu-2sigma: the worst of five normal scores is expected at mu - 1.16 sigma.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"pairs.k={self.k}: must be at least 1")

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """One pair; the samples must stand in the order in which they were drawn, not sorted."""
        return [(candidates.best, int(candidates.scores[: self.k].argmin()))]


@dataclass(frozen=True)
class Threshold(PairRule):
    """Pairs whose scores differ by at least `margin`: all of them, or only the best against the worst sample."""

    margin: float
    which: Literal["all", "best"]

    def __post_init__(self) -> None:
        if not 0 < self.margin < float("inf"):
            raise ValueError(f"pairs.margin={self.margin}: must be greater than 0; for any difference use all_pairs")
        if self.which not in ("all", "best"):
            raise ValueError(f"pairs.which={self.which}: must be all or best")

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """Any number of pairs."""
        scores = candidates.scores
        least = self.margin * (1 - 1e-9)  # 0.3 - 0.2 is a margin of 0.1 to its reader, not to binary arithmetic
        picks = _ordered(scores) if self.which == "all" else [(candidates.best, int(scores.argmin()))]
        return [(i, j) for i, j in picks if scores[i] - scores[j] >= least]


@dataclass(frozen=True)
class AllPairs(PairRule):
    """Every two samples of different score, the higher one chosen: up to G(G-1)/2 pairs."""

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """Any number of pairs."""
        return _ordered(candidates.scores)


@dataclass(frozen=True)
class RandomRejected(PairRule):
    """Best against a random one of the rest: WPO's first hybrid data (Zhou et al. 2024, arXiv 2406.11827)."""

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """One pair; the draw may tie with the best, which leaves the prompt without a pair."""
        rest = [i for i in range(len(candidates.scores)) if i != candidates.best]
        return [(candidates.best, int(candidates.rng().choice(rest)))]


@dataclass(frozen=True)
class WpoV2(PairRule):
    """Best against worst with ties by length: WPO's second hybrid data (arXiv 2406.11827, authors' repository).

    Ties at the top: the shortest. Ties at the bottom: the one whose length is closest to the chosen one's.
    """

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """One pair."""
        scores, lengths = candidates.scores, candidates.lengths
        chosen = min(np.flatnonzero(scores == scores.max()), key=lambda i: lengths[i])
        rejected = min(np.flatnonzero(scores == scores.min()), key=lambda i: abs(lengths[i] - lengths[chosen]))
        return [(int(chosen), int(rejected))]


@dataclass(frozen=True)
class OneEach(PairRule):
    """One random sample that scores at least `threshold` against one random sample that scores less.

    For verified answers (1 right, 0 wrong: threshold 0.5), as in multi-turn DPO, arXiv 2409.02392.
    """

    threshold: float

    def __call__(self, candidates: Candidates) -> list[Pick]:
        """One pair, or none if all samples are on one side."""
        right = candidates.scores >= self.threshold
        if right.all() or not right.any():
            return []
        rng = candidates.rng()
        return [(int(rng.choice(np.flatnonzero(right))), int(rng.choice(np.flatnonzero(~right))))]


@dataclass
class Account:
    """Prompts in = prompts with pairs + prompts dropped; pairs proposed = pairs written + pairs dropped."""

    rule: str
    seed: int
    max_per_prompt: int | None
    sources: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    samples_in: int = 0
    samples_unused: dict[str, int] = field(default_factory=dict)  # missing_score, empty
    prompts_in: int = 0
    prompts_used: int = 0
    prompts_dropped: dict[str, int] = field(default_factory=dict)
    pairs_proposed: int = 0
    pairs_out: int = 0
    pairs_dropped: dict[str, int] = field(default_factory=dict)
    origins: dict[str, int] = field(default_factory=dict)  # of the pairs written

    def as_dict(self) -> Json:
        """For JSON. Fails if a prompt or a pair is unaccounted for."""
        assert self.prompts_in == self.prompts_used + sum(self.prompts_dropped.values())
        assert self.pairs_proposed == self.pairs_out + sum(self.pairs_dropped.values())
        return dict(vars(self))

    def lines(self) -> list[str]:
        """The account for the terminal."""
        used = self.samples_in - sum(self.samples_unused.values())
        out = [
            f"pairs rule: {self.rule}, seed {self.seed}",
            f"pairs samples: {self.samples_in} in = {used} used + {_counts(self.samples_unused)}",
            f"pairs prompts: {self.prompts_in} in = {self.prompts_used} with pairs + {_counts(self.prompts_dropped)}",
            f"pairs: {self.pairs_proposed} by the rule = {self.pairs_out} written + {_counts(self.pairs_dropped)}",
        ]
        if self.origins:
            out.append("pairs origins: " + ", ".join(f"{n} {name}" for name, n in sorted(self.origins.items())))
        return out


def build_pairs(sources: Sequence[str], rule: PairRule, out: Path, max_per_prompt: int | None, seed: int) -> Account:
    """Read scored samples, apply the rule to each prompt, write the preference file and its account beside it.

    sources: see scored.read_scored. out: NAME.jsonl, replaced as a whole or not at all; the account is
    NAME.account. Raises ValueError for settings and rows that cannot be used, and if no pair is left.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"out={out}: must end in .jsonl")
    if any(Path(file_and_origin(name)[0]).resolve() == out.resolve() for name in sources):
        raise ValueError(f"out={out}: is one of the files to read; give another name")
    files = read_scored(sources)
    rows, account = pairs_of(files.prompts, rule, max_per_prompt, seed)
    account.sources, account.sha256 = list(files.sources), list(files.sha256)
    if not rows:
        raise ValueError(
            f"out={out}: no pair from {account.prompts_in} prompts ({_counts(account.prompts_dropped)}); give more "
            "samples of each prompt, or another rule with pairs=..."
        )
    write_lines(out, (json.dumps(row, ensure_ascii=False) for row in rows))
    # not .json, nor .jsonl.account: in a directory that is read as a data set both would be taken for rows
    write_lines(out.with_suffix(".account"), [json.dumps(account.as_dict(), indent=1)])
    return account


def pairs_of(
    prompts: Iterable[Scored], rule: PairRule, max_per_prompt: int | None, seed: int
) -> tuple[list[Json], Account]:
    """Preference rows for formats.py and the account of them; prompts may come from files or from a rollout.

    max_per_prompt: a larger number of pairs is cut to a random choice of this many, kept in the rule's order.
    """
    if max_per_prompt is not None and max_per_prompt < 1:
        raise ValueError(f"max_per_prompt={max_per_prompt}: must be at least 1, or null for no limit")
    account = Account(repr(rule), seed, max_per_prompt)
    rows: list[Json] = []
    for scored in prompts:
        account.prompts_in += 1
        found, reason = _of_prompt(scored, rule, max_per_prompt, seed, account)
        rows += found
        if found:
            account.prompts_used += 1
        else:
            _count(account.prompts_dropped, reason)
    account.pairs_out = len(rows)
    for row in rows:
        if "origin" in row:
            _count(account.origins, row["origin"])
    return rows, account


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file whole or not at all. Raises ValueError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as stream:
            stream.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); give another place") from error


def _of_prompt(
    scored: Scored, rule: PairRule, max_per_prompt: int | None, seed: int, account: Account
) -> tuple[list[Json], str]:
    """The rows of a prompt, and if there are none, why."""
    account.samples_in += len(scored.samples)
    samples = []
    for sample in scored.samples:
        if sample.score is None or sample.empty:
            _count(account.samples_unused, "missing_score" if sample.score is None else "empty")
        else:
            samples.append(sample)
    if len(samples) < 2:
        return [], "fewer_than_two_scores"
    own_seed = int.from_bytes(hashlib.sha256(f"{seed} {scored.key}".encode()).digest()[:8], "big")
    picks = rule(_candidates(samples, own_seed))
    account.pairs_proposed += len(picks)
    kept: dict[tuple[str, str], Pick] = {}
    reason = "no_pair_by_rule"
    for pick in picks:
        chosen, rejected = (samples[i] for i in pick)
        identity = (chosen.identity, rejected.identity)
        why = _refusal(pick, chosen, rejected, rule) or ("duplicate" if identity in kept else "")
        if why:
            reason = why
            _count(account.pairs_dropped, why)
        else:
            kept[identity] = pick
    found = list(kept.values())
    if max_per_prompt is not None and len(found) > max_per_prompt:
        # a stream of its own: what the rule drew does not decide what the cap keeps
        places = np.random.default_rng((own_seed, 1)).choice(len(found), max_per_prompt, replace=False)
        account.pairs_dropped["over_max_per_prompt"] = (
            account.pairs_dropped.get("over_max_per_prompt", 0) + len(found) - max_per_prompt
        )
        found = [found[i] for i in sorted(places)]
    return [_row(scored, samples[i], samples[j]) for i, j in found], reason


def _candidates(samples: Sequence[Sample], seed: int) -> Candidates:
    tokens = [s.num_tokens for s in samples]
    lengths = [s.num_characters for s in samples] if None in tokens else tokens  # never two units in one prompt
    return Candidates(
        np.array([s.score for s in samples], dtype=float), np.array(lengths), tuple(s.origin for s in samples), seed
    )


def _refusal(pick: Pick, chosen: Sample, rejected: Sample, rule: PairRule) -> str:
    if pick[0] == pick[1]:
        return "same_sample"
    if chosen.score == rejected.score:
        return "equal_score"
    assert chosen.score is not None
    assert rejected.score is not None
    if chosen.score < rejected.score:
        raise ValueError(f"pairs={rule!r}: chose score {chosen.score} over {rejected.score}; mend the rule")
    if chosen.identity == rejected.identity:
        return "equal_text"
    return "" if _in_tokens(chosen, rejected) or _readable(chosen, rejected) else "different_forms"


def _in_tokens(chosen: Sample, rejected: Sample) -> bool:
    return chosen.tokens is not None and rejected.tokens is not None


def _readable(chosen: Sample, rejected: Sample) -> bool:
    return chosen.completion is not None and rejected.completion is not None


def _row(scored: Scored, chosen: Sample, rejected: Sample) -> Json:
    """Exact tokens where both samples have them, as a rollout wrote them; else what can be read."""
    row: Json = {"prompt": scored.prompt}
    if scored.tools:
        row["tools"] = scored.tools
    prompt = [{"role": "user", "content": scored.prompt}] if isinstance(scored.prompt, str) else scored.prompt
    for name, sample in (("chosen", chosen), ("rejected", rejected)):
        if _in_tokens(chosen, rejected):
            row[name] = {**(sample.tokens or {}), "messages": prompt, "finished": sample.finished is not False}
        else:
            row[name] = sample.completion
            if sample.finished is not None:
                row[f"{name}_finished"] = sample.finished
        row[f"{name}_score"] = sample.score
    if len(chosen.rewards) > 1 and len(rejected.rewards) > 1:
        row["scores"] = {"chosen": dict(chosen.rewards), "rejected": dict(rejected.rewards)}
    if chosen.origin or rejected.origin:
        row["origin"] = chosen.origin if chosen.origin == rejected.origin else "mixed"
    return row


def _ordered(scores: np.ndarray) -> list[Pick]:
    """All pairs of different score, the higher first, in the order of the samples."""
    return [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1


def _counts(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
    return f"{sum(counts.values())} dropped" + (f" ({reasons})" if reasons else "")
