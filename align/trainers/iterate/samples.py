"""A round's completions as they are written, the numbers that are told of them, and which prompts a round has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.data.chat import prompt_ids
from align.data.prompts import PromptRow
from align.jsons import Json, Tokenizer
from align.rollout.base import Completion
from align.trainers.experience import Group
from align.trainers.row_cache import Line

ORIGIN = "on_policy"
DRAW, TRAIN, HELDOUT = range(3)  # the first key of the seeds of each phase


def slices(count: int, rounds: int, per_round: int | None) -> list[range]:
    """The places of each round's prompts among `count`, which are enough: consecutive, none in two rounds."""
    if per_round is not None:
        return [range(r * per_round, (r + 1) * per_round) for r in range(rounds)]
    return [range(r * count // rounds, (r + 1) * count // rounds) for r in range(rounds)]


def line_of(group: Group, names: Sequence[str], tokenizer: Tokenizer) -> Line:
    """A group as it is written and as read_scored reads it; its greedy completion, if there is one, comes last."""
    sampled = list(zip(group.completions, group.texts, group.rewards, group.scores, strict=True))
    lines = [_completion(group.prompt, *one, names) for one in sampled]
    if group.greedy is not None:
        assert group.greedy_rewards is not None
        greedy_completion = _completion(
            group.prompt, group.greedy, group.greedy_text, group.greedy_rewards, group.greedy_score, names
        )
        lines.append({**greedy_completion, "greedy": True})
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


def sample_metrics(lines: Sequence[Line], names: Sequence[str]) -> dict[str, float]:
    """Means of what was drawn, over what has a reward; the greedy completions by themselves."""
    sampled = [c for line in lines for c in line["completions"] if not c.get("greedy")]
    greedy = [c for line in lines for c in line["completions"] if c.get("greedy")]
    scores = _known([c["score"] for c in sampled])
    out = {f"reward/{name}": _mean([c["rewards"][name] for c in sampled]) for name in names}
    if greedy:
        out |= {f"reward/{name}_greedy": _mean([c["rewards"][name] for c in greedy]) for name in names}
    return out | {
        "reward/total": float(np.mean(scores)) if scores else math.nan,
        "reward/total_std": float(np.std(scores)) if scores else math.nan,
        "reward/missing": len(sampled) - len(scores),
        "rollout/settled_prompts": float(
            np.mean([len(set(_known([c["score"] for c in line["completions"]]))) < 2 for line in lines])
        ),
        "rollout/tokens": float(np.mean([c["spans"][-1][2] - c["spans"][-1][1] for c in sampled])),
        "rollout/truncated": float(np.mean([not c["finished"] for c in sampled])),
    }


def split(lines: Sequence[Line]) -> tuple[list[Line], list[list[Line]]]:
    """The greedy completion of each prompt, and its drawn ones."""
    return (
        [line["completions"][-1] for line in lines],
        [[c for c in line["completions"] if not c.get("greedy")] for line in lines],
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _mean(values: Sequence[float | None]) -> float:
    known = _known(values)
    return float(np.mean(known)) if known else math.nan
