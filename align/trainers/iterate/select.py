"""What a round learns from: rows of its scored completions, and the account of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from align import build
from align.config import Config, IterateConfig
from align.data.pairs import MaxMin, PairRule, pairs_of
from align.data.scored import Sample, Scored
from align.jsons import Json
from align.rollout.base import seed_of
from align.trainers.iterate.samples import ORIGIN
from align.trainers.row_cache import Line


@dataclass(frozen=True)
class Chosen:
    """A round's training rows and the account of its prompts: prompts = used + dropped."""

    rows: list[Json]
    prompts: int
    used: int
    dropped: Mapping[str, int]  # prompts by reason

    def metrics(self) -> dict[str, float]:
        """For the round's line of metrics.jsonl."""
        out: dict[str, float] = {"data/rows": len(self.rows), "data/prompts": self.prompts, "data/used": self.used}
        return out | {f"data/dropped_{reason}": count for reason, count in sorted(self.dropped.items())}

    def line(self) -> str:
        """For people."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items())) or "none"
        return f"{len(self.rows)} rows from {self.used} of {self.prompts} prompts; left out: {reasons}"


def select(config: Config, number: int, lines: Sequence[Line]) -> Chosen:
    """What a round learns from, see trainer.select."""
    t = config.trainer
    assert isinstance(t, IterateConfig)
    if t.select == "best_of_n":
        return best_of_n(lines, t.min_score)
    if t.select == "labelled" and t.min_score is not None:
        return labelled(lines, t.min_score)
    rule = MaxMin() if config.pairs is None else build.pair_rule(config)
    found = paired(lines, rule, t.max_pairs_per_prompt, seed_of(config.seed, number))
    return found if t.select == "pairs" else sides(found)


def paired(lines: Sequence[Line], rule: PairRule, max_per_prompt: int | None, seed: int) -> Chosen:
    """Rows of chosen and rejected; prompts whose scores are all equal, or fewer than two, are left out before the
    rule."""
    dropped: Counter[str] = Counter()
    kept = []
    for scored in map(scored_of, lines):
        scores = [s.score for s in _known(scored)]
        if len(scores) < 2:
            dropped["missing_reward"] += 1
        elif len(set(scores)) == 1:
            dropped["all_equal"] += 1
        else:
            kept.append(scored)
    rows, account = pairs_of(kept, rule, max_per_prompt, seed)
    return Chosen(rows, len(lines), account.prompts_used, dropped + Counter(account.prompts_dropped))


def best_of_n(lines: Sequence[Line], min_score: float | None) -> Chosen:
    """Rows to imitate: the best completion of each prompt, the first on ties, if it scores at least min_score."""
    rows = []
    dropped: Counter[str] = Counter()
    for scored in map(scored_of, lines):
        best = max(_known(scored), key=_score, default=None)
        if best is None:
            dropped["missing_reward"] += 1
        elif min_score is not None and _score(best) < min_score:
            dropped["below_min_score"] += 1
        else:
            rows.append(_row(scored, best))
    return Chosen(rows, len(lines), len(rows), dropped)


def labelled(lines: Sequence[Line], min_score: float) -> Chosen:
    """Every completion with its label: desirable if it scores at least min_score."""
    found = [(scored, _known(scored)) for scored in map(scored_of, lines)]
    rows = [{**_row(scored, s), "label": _score(s) >= min_score} for scored, known in found for s in known]
    used = sum(bool(known) for _, known in found)
    return Chosen(rows, len(lines), used, Counter(missing_reward=len(lines) - used) if used < len(lines) else {})


def sides(pairs: Chosen) -> Chosen:
    """Both sides of each pair with their labels; of all completions with one text the first stands for them."""
    rows: dict[tuple[bool, tuple[int, ...]], Line] = {}
    for pair in pairs.rows:
        for side, label in (("chosen", True), ("rejected", False)):
            row = {**pair[side], "score": pair[f"{side}_score"], "label": label, "origin": ORIGIN}
            rows.setdefault((label, tuple(row["token_ids"])), row)
    return replace(pairs, rows=list(rows.values()))


def _known(scored: Scored) -> list[Sample]:
    return [s for s in scored.samples if s.score is not None and not s.empty]


def _score(sample: Sample) -> float:
    assert sample.score is not None
    return sample.score


def scored_of(line: Line) -> Scored:
    """A line as pair rules read it."""
    return Scored(
        line["prompt"],
        tuple(
            Sample(
                c["score"],
                c["text"],
                {"token_ids": c["token_ids"], "spans": c["spans"]},
                c["origin"],
                c["finished"],
                line["source"],
                {name: value for name, value in c.get("rewards", {}).items() if value is not None},
            )
            for c in line["completions"]
        ),
    )


def _row(scored: Scored, sample: Sample) -> Json:
    """A completion by its exact tokens; messages are for reading."""
    prompt = [{"role": "user", "content": scored.prompt}] if isinstance(scored.prompt, str) else list(scored.prompt)
    said = [{"role": "assistant", "content": sample.completion}]
    return {
        **(sample.tokens or {}),
        "messages": [*prompt, *said],
        "finished": sample.finished,
        "score": sample.score,
        "origin": sample.origin,
    }
