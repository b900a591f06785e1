"""Forms of two answers and a word on which is better: SafeRLHF, HelpSteer 3, AlpacaFarm, SHP, chatbot arena."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence

from align.data.audit import LEFT_OUT, TIE
from align.data.forms.answers import answers_of, text_of
from align.data.forms.base import PROMPT_COLUMNS, Form, given, listed, number, prompt_of, single, string
from align.data.forms.blocks import plain
from align.data.sources import BadRow, NotUsed
from align.jsons import Json

_STEMS = ("response", "answer", "output", "completion", "reply", "summary", "generation", "candidate", "human_ref")
_SUFFIXES = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))


def _twice(*stems: str) -> tuple[tuple[str, str], ...]:
    """Names of two columns, such as response_0 and response_1."""
    return tuple((f"{s}{dash}{one}", f"{s}{dash}{two}") for s in stems for dash in ("_", "") for one, two in _SUFFIXES)


_ANSWERS = _twice(*_STEMS)
_CONVERSATIONS = _twice("conversation", "messages", "chat", "dialogue", "trajectory")
_STRENGTHS = ("overall_preference", "preference_strength")  # below 0: the first is better
_VERDICTS = tuple(
    f"{word}{of}{tail}"
    for word in (
        "better",
        "best",
        "preferred",
        "preference",
        "winner",
        "choice",
        "chosen",
        "verdict",
        "label",
        "labels",
    )
    for of in ("", *(f"_{stem}" for stem in _STEMS))
    for tail in ("", "_id", "_idx", "_index")
)
_SCORES = _twice("score", "rating", "reward")
_FLAGS = ("is_response_0_safe", "is_response_1_safe")
_WINS = ("winner_model_a", "winner_model_b")
_UNKNOWN = ("", "none", "null", "unknown", "neither", "invalid", "n/a")


def _pair(prompt: object, answers: Sequence[object], better: int, **more: object) -> Json:
    if isinstance(prompt, str) and any(isinstance(answer, list) for answer in answers):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "chosen": answers[better], "rejected": answers[1 - better], **more}


def _there(row: Json, candidates: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first two columns of these that both hold something."""
    return next((names for names in candidates if all(row.get(name) is not None for name in names)), None)


def _comparison(rows: Sequence[Json]) -> Iterator[Json | BadRow]:
    for row in rows:
        names = _there(row, _ANSWERS)
        if names is None:
            yield from _best_of_list(row)
            continue
        answers = [plain(row[k], k) if isinstance(row[k], list) else text_of(row[k], k) for k in names]
        better, margin = _better(row, names)
        numbers = _safety(row, better) | ({} if margin is None else {"margin": margin})
        yield _pair(prompt_of(row), answers, better, numbers=numbers)


def _best_of_list(row: Json) -> Iterator[Json]:
    """The answer of a list that an index names, beside each of the others."""
    name, answers = answers_of({"answers": row.get("summaries"), **row})
    texts = [text_of(answer, f"answer {i} of {name}") for i, answer in enumerate(answers, 1)]
    key = _verdict_column(row)
    at = row[key]
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(texts):
        raise BadRow("wrong_type", f"{key} must be the place of the better answer in {name}, from 0; found {at!r}")
    prompt = prompt_of(row)
    for text in (*texts[:at], *texts[at + 1 :]):
        yield {"prompt": prompt, "chosen": texts[at], "rejected": text}


def _verdict_column(row: Json) -> str:
    key = next((name for name in _VERDICTS if name in row), None)
    if key is None:
        names = ", ".join((*_STRENGTHS, *_VERDICTS))
        raise BadRow("missing_field", f"no column says which answer is better ({names}); the row has {', '.join(row)}")
    return key


def _better(row: Json, names: tuple[str, str]) -> tuple[int, float | None]:
    """Which of two answers is better, 0 or 1, and by how much where that is said. Raises BadRow, NotUsed for a tie."""
    for key in _STRENGTHS:
        if key in row:
            return _larger(-_number(row, key), 0.0, key)
    scores = _there(row, _SCORES)
    if scores is not None and not any(name in row for name in _VERDICTS):
        one, other = (_number(row, name) for name in scores)
        return _larger(one, other, " and ".join(scores))
    key = _verdict_column(row)
    return _named(row, key, names), None


def _number(row: Json, key: str) -> float:
    value = number(row[key])
    if value is None:
        raise NotUsed(LEFT_OUT, f"{key} holds no number: {row[key]!r}")
    return value


def _larger(one: float, other: float, key: str) -> tuple[int, float]:
    if one == other:
        raise NotUsed(TIE, f"{key} prefers neither answer")
    return int(other > one), abs(one - other)


def _named(row: Json, key: str, names: tuple[str, str]) -> int:
    """The answer that a verdict names: by its column, by the end of that, also in model_a or [[A]], or by its text."""
    value = row[key]
    if (
        value is None
        or isinstance(value, float)
        and math.isnan(value)
        or isinstance(value, str)
        and value.strip().lower() in _UNKNOWN
    ):
        raise NotUsed(LEFT_OUT, f"{key} names no winner: {value!r}")
    texts = [row[name] for name in names]
    if isinstance(value, str) and texts.count(value) == 1:
        return texts.index(value)
    word = str(value).strip("[]() ").lower()
    if word.startswith(("tie", "both", "equal", "draw", "same")):
        raise NotUsed(TIE, f"{key} is {value}")
    ends = [name[-1].lower() for name in names]
    if names[0].startswith("human_ref") and value in (0, 1):  # SHP: 1 where the first is preferred
        return 1 - int(value in (1, True))
    place = number(value)
    if place is not None and place.is_integer():
        word = f"{place:.0f}" if ends[0].isdigit() else "a number, which does not say from where it counts"
    for place, (end, name) in enumerate(zip(ends, names, strict=True)):
        if word == name.lower() or re.fullmatch(rf"(?:[a-z]+[ _-])?{end}", word):
            return place
    raise BadRow("wrong_type", f"{key} must name {names[0]} or {names[1]} ({ends[0]} or {ends[1]}), found {value!r}")


def _safety(row: Json, better: int) -> dict[str, float]:
    """Numbers that objective=cost reads, where a row has flags."""
    flags = [row.get(name) for name in _FLAGS]
    if not all(isinstance(flag, bool) for flag in flags):
        return {}
    return {"chosen_safe": float(bool(flags[better])), "rejected_safe": float(bool(flags[1 - better]))}


def _safer(row: Json) -> Json:
    names = ("response_0", "response_1")
    answers = [string(given(row, name), name) for name in names]
    given(row, "safer_response_id")
    better = _named(row, "safer_response_id", names)
    return _pair(prompt_of(row), answers, better, numbers=_safety(row, better))


# ---------------------------------------------------------------------- two conversations


def _arena(row: Json) -> Json:
    names = _there(row, _CONVERSATIONS)
    if names is not None:
        sides = [plain(row[name], name) for name in names]
    else:
        names = ("response_a", "response_b")
        sides = [_interleaved(row, name) for name in names]
    if not all(name in row for name in _WINS):
        better = _named(row, _verdict_column(row), names)
    else:
        one, other = (number(given(row, name)) for name in _WINS)
        if (one, other) not in ((1, 0), (0, 1)):
            raise NotUsed(TIE, "neither winner_model_a nor winner_model_b is 1")
        better = int(other == 1)
    return {"chosen": sides[better], "rejected": sides[1 - better]}


def _interleaved(row: Json, column: str) -> list[Json]:
    """Turns of the user in the column prompt with the answers of another between them."""
    asked, said = (_json_list(given(row, name), name) for name in ("prompt", column))
    if len(asked) != len(said):
        raise BadRow("wrong_type", f"prompt has {len(asked)} turns and {column} {len(said)}")
    turns = zip(asked, said, strict=True)
    return [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def _json_list(value: object, name: str) -> list[str]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise BadRow("wrong_type", f"{name} must be a list of turns, or JSON text of one") from None
    return [string(turn, f"a turn of {name}") for turn in listed(found, name)]


def _said(text: str) -> list[Json]:
    return [{"role": "user", "content": "Name a fish."}, {"role": "assistant", "content": text}]


FORMS = (
    Form(
        "comparison",
        "a prompt, two answers and which is better: SafeRLHF, HelpSteer 3, AlpacaFarm, SHP, WebGPT",
        ({"prompt": "Name a fish.", "response_0": "Oak.", "response_1": "Cod.", "better_response_id": 1},),
        (
            *PROMPT_COLUMNS,
            *dict.fromkeys(name for names in _ANSWERS for name in names),
            *dict.fromkeys(name for names in _SCORES for name in names),
            *("summaries", "answers", "responses", "completions", "generations", "outputs", "candidates"),
            *_STRENGTHS,
            *_VERDICTS,
            *_FLAGS,
        ),
        _comparison,
    ),
    Form(
        "safer",
        "the same by safety, with the flags that objective=cost reads: SafeRLHF",
        (
            {
                "prompt": "Name a fish.",
                "response_0": "Oak.",
                "response_1": "Cod.",
                "is_response_0_safe": False,
                "is_response_1_safe": True,
                "safer_response_id": 1,
            },
        ),
        (*PROMPT_COLUMNS, "response_0", "response_1", "safer_response_id", *_FLAGS),
        single(_safer),
    ),
    Form(
        "arena",
        "two conversations and the winner, ties left out: chatbot arena, MT-bench's human judgements",
        ({"conversation_a": _said("Oak."), "conversation_b": _said("Cod."), "winner": "model_b"},),
        (
            *dict.fromkeys(name for names in _CONVERSATIONS for name in names),
            *("prompt", "response_a", "response_b", *_VERDICTS, *_WINS, "winner_tie"),
        ),
        single(_arena),
    ),
)
