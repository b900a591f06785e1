"""What a round of iterated training keeps: scored completions, the rows that are learnt from, held-out answers.

All numbers are told from the files, so that a round which was killed and goes on cannot differ. When which file is made
is iterate.py's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.checkpoint import WriteFailed
from align.data.chat import prompt_ids
from align.data.pairs import PairRule, pairs_of
from align.data.prompts import PromptRow
from align.data.scored import Sample, Scored
from align.files import write_whole
from align.jsons import Fields, Json, Tokenizer
from align.rollout.base import Completion
from align.trainers.experience import Group

Line = Json  # a prompt with its completions, the form that scored.read_scored reads
ORIGIN = "on_policy"


# ---------------------------------------------------------------------- files


def begin(directory: Path, key: Fields) -> bool:
    """Make `directory` the place of what depends on `key`; whether something older was thrown away for it."""
    path = directory / "key.json"
    wanted = json.loads(json.dumps(key, default=str))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == wanted:
        return False
    stale = directory.exists()
    if stale:
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    write(path, json.dumps(wanted, indent=1) + "\n")
    return stale


def write(path: Path, text: str) -> None:
    """A file, whole or not there. Raises WriteFailed when the disk is full."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise WriteFailed(path, error, len(text)) from error


def write_rows(path: Path, rows: Sequence[Fields]) -> None:
    """A line a row."""
    write(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))


def read_rows(path: Path) -> list[Json]:
    """What write_rows wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def slices(count: int, rounds: int, per_round: int | None, setting: str) -> list[range]:
    """The places of each round's prompts among `count`: consecutive, none in two rounds.

    setting: where the prompts come from, for the message. Raises ValueError if there are too few.
    """
    needed = rounds * (per_round or 1)
    if needed > count:
        raise ValueError(
            f"trainer.rounds={rounds} with trainer.prompts_per_round={per_round or 'null'} need {needed} prompts, "
            f"{setting} has {count}; lower one of them or give more (data.repeat=[2] sees each prompt twice)"
        )
    if per_round is not None:
        return [range(r * per_round, (r + 1) * per_round) for r in range(rounds)]
    return [range(r * count // rounds, (r + 1) * count // rounds) for r in range(rounds)]


def line_of(group: Group, names: Sequence[str], tokenizer: Tokenizer) -> Line:
    """A group as it is written; its greedy completion, if there is one, comes last."""
    drawn = list(zip(group.completions, group.texts, group.rewards, group.scores, strict=True))
    lines = [_completion(group.prompt, *one, names) for one in drawn]
    if group.greedy is not None:
        assert group.greedy_rewards is not None
        twin = _completion(
            group.prompt, group.greedy, group.greedy_text, group.greedy_rewards, group.greedy_score, names
        )
        lines.append({**twin, "greedy": True})
    return {"source": group.prompt.source, "prompt": _prompt(group.prompt, tokenizer), "completions": lines}


def _completion(
    prompt: PromptRow, completion: Completion, text: str, rewards: np.ndarray, score: float, names: Sequence[str]
) -> Json:
    start = len(prompt.token_ids)
    ids = [*prompt.token_ids, *completion.token_ids]
    return {
        "text": text,
        "token_ids": ids,
        "spans": [["prompt", 0, start, False], ["assistant", start, len(ids), True]],
        "finished": completion.finished,
        "origin": ORIGIN,
        "rewards": {name: _number(r) for name, r in zip(names, rewards, strict=True)},
        "score": _number(score),
    }


def _prompt(row: PromptRow, tokenizer: Tokenizer) -> Any:
    """The prompt as data sets write it; of a row that came as tokens the text of these."""
    if row.messages is not None:
        return list(row.messages)
    if row.text and tuple(prompt_ids(tokenizer, row.text)) == row.token_ids:
        return row.text
    return tokenizer.decode(row.token_ids, skip_special_tokens=False)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------------- what is learnt from


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


Select = Callable[[Sequence[Line]], Chosen]


@dataclass(frozen=True)
class Pairs:
    """Pairs by a rule of pairs.py; prompts whose scores are all equal, or fewer than two, are left out before it."""

    rule: PairRule
    max_per_prompt: int | None
    seed: int

    def __call__(self, lines: Sequence[Line]) -> Chosen:
        """Rows of chosen and rejected."""
        dropped: Counter[str] = Counter()
        kept = []
        for scored in map(scored_of, lines):
            known = [s.score for s in scored.samples if s.score is not None and not s.empty]
            if len(known) < 2:
                dropped["missing_reward"] += 1
            elif len(set(known)) == 1:
                dropped["all_equal"] += 1
            else:
                kept.append(scored)
        rows, account = pairs_of(kept, self.rule, self.max_per_prompt, self.seed)
        return Chosen(rows, len(lines), account.prompts_used, dropped + Counter(account.prompts_dropped))


@dataclass(frozen=True)
class BestOfN:
    """The best completion of each prompt, the first on ties, if it scores at least min_score: rejection sampling."""

    min_score: float | None

    def __call__(self, lines: Sequence[Line]) -> Chosen:
        """Rows to imitate."""
        rows = []
        dropped: Counter[str] = Counter()
        for scored in map(scored_of, lines):
            known = [s for s in scored.samples if s.score is not None and not s.empty]
            if not known:
                dropped["missing_reward"] += 1
                continue
            best = max(known, key=lambda s: s.score)  # type: ignore[arg-type, return-value]
            assert best.score is not None
            if self.min_score is not None and best.score < self.min_score:
                dropped["below_min_score"] += 1
            else:
                rows.append(_row(scored, best))
        return Chosen(rows, len(lines), len(rows), dropped)


@dataclass(frozen=True)
class Labelled:
    """Every completion with its label: desirable if it scores at least min_score."""

    min_score: float

    def __call__(self, lines: Sequence[Line]) -> Chosen:
        """Rows with a label."""
        rows = []
        used = 0
        dropped: Counter[str] = Counter()
        for scored in map(scored_of, lines):
            known = [s for s in scored.samples if s.score is not None and not s.empty]
            used += bool(known)
            if not known:
                dropped["missing_reward"] += 1
            rows += [{**_row(scored, s), "label": s.score >= self.min_score} for s in known]  # type: ignore[operator]
        return Chosen(rows, len(lines), used, dropped)


@dataclass(frozen=True)
class BestAndWorst:
    """Both sides of each pair of a rule, each with its label, and each once."""

    pairs: Pairs

    def __call__(self, lines: Sequence[Line]) -> Chosen:
        """Rows with a label; of all completions with one text the first stands for them."""
        pairs = self.pairs(lines)
        rows: dict[tuple[bool, tuple[int, ...]], Json] = {}
        for pair in pairs.rows:
            for side, label in (("chosen", True), ("rejected", False)):
                row = {**pair[side], "score": pair[f"{side}_score"], "label": label, "origin": ORIGIN}
                rows.setdefault((label, tuple(row["token_ids"])), row)
        return Chosen(list(rows.values()), pairs.prompts, pairs.used, pairs.dropped)


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


# ---------------------------------------------------------------------- numbers


def sample_metrics(lines: Sequence[Line], names: Sequence[str]) -> dict[str, float]:
    """Means of what was drawn, over what has a reward; the greedy completions by themselves."""
    drawn = [c for line in lines for c in line["completions"] if not c.get("greedy")]
    greedy = [c for line in lines for c in line["completions"] if c.get("greedy")]
    scores = _known([c["score"] for c in drawn])
    out = {f"reward/{name}": _mean([c["rewards"][name] for c in drawn]) for name in names}
    if greedy:
        out |= {f"reward/{name}_greedy": _mean([c["rewards"][name] for c in greedy]) for name in names}
    return out | {
        "reward/total": float(np.mean(scores)) if scores else math.nan,
        "reward/total_std": float(np.std(scores)) if scores else math.nan,
        "reward/missing": len(drawn) - len(scores),
        "rollout/settled_prompts": float(
            np.mean([len(set(_known([c["score"] for c in line["completions"]]))) < 2 for line in lines])
        ),
        "rollout/tokens": float(np.mean([c["spans"][-1][2] - c["spans"][-1][1] for c in drawn])),
        "rollout/truncated": float(np.mean([not c["finished"] for c in drawn])),
    }


def heldout(lines: Sequence[Line]) -> tuple[list[Json], list[list[Json]]]:
    """The greedy completion of each held-out prompt, and its drawn ones."""
    return (
        [line["completions"][-1] for line in lines],
        [[c for c in line["completions"] if not c.get("greedy")] for line in lines],
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _mean(values: Sequence[float | None]) -> float:
    known = _known(values)
    return float(np.mean(known)) if known else math.nan
