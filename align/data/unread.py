"""Columns that nothing reads: those that change what a row means are refused with the words to type, others told.

Which fields a row has is formats.py's; a field that stands here was read by nothing.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from align.data.formats import Dialogue, Record, Tokenised
from align.data.sources import BadRow, NotUsed
from align.jsons import Fields, Json

# What our own commands write beside a row, for people and for others: by a column that only they write.
_WRITTEN = {
    "gold_chosen": ("gold_chosen", "gold_rejected", "id"),
    "entry": ("entry", "task", "answer"),  # problems of a gym
    "prompt_messages": ("prompt_messages", "problem", "answer", "given", "logps", "reward", "end", "num_turns")
    + ("tool_errors", "last_call_failed", "re_encodes"),
    "pattern": ("pattern", "subset"),
}
_SAMPLED = ("id", "chosen_score", "rejected_score")  # of rows in tokens, which only we write
_MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))
# Where a question stands in public sets; the first that is there is offered. Turns change a row that has a prompt too.
_TURNS = ("messages", "conversations", "conversation", "history", "dialogue", "dialog")
_PROMPTS = ("prompt", "question", "instruction", "query", "problem", "user_prompt", "user", "request", "input")
_PROMPTS += ("inputs", "context", "instructions", "questions", *_TURNS)
_ANSWERS = {
    "chosen": ("chosen_response", "preferred", "preferred_output", "preferred_response", "better", "positive"),
    "rejected": ("rejected_response", "dispreferred", "non_preferred_output", "rejected_output", "worse", "negative"),
    "completion": ("response", "output", "answer", "solution", "target", "reply", "generation", "assistant"),
}
_UNSURE = ("missing_field", "assistant_first", "empty_prompt", "wrong_type")  # reasons that another reading may cure


class Unread(BadRow):
    """A row with a column that changes what it means and that nothing reads."""

    def __init__(self, column: str, message: str):
        super().__init__("unread_column", message)
        self.column = column


def unread(record: Record) -> tuple[str, ...]:
    """The columns that nothing reads, but those that our own commands write. Raises Unread for one that changes what
    the row means."""
    ours = {name for mark, names in _WRITTEN.items() if mark in record.unread for name in names}
    if all(isinstance(side, Tokenised) for side in record.sides.values()):
        ours.update(_SAMPLED)
    left = {name: value for name, value in record.unread.items() if name not in ours}
    for name, value in left.items():
        cure = _cure(name, value, record)
        if cure:
            raise Unread(name, f"the column {name} is not read: {cure}, or data.ignore=[{name}] if it says nothing")
    _refuse_lost_prompt(record, left)
    return tuple(left)


def refuse_unasked(row: Fields, ignore: Container[str]) -> None:
    """Raises Unread for a column that a prompt lacks: pictures, and instructions under another name. All others go to
    the rewards."""
    for name, value in row.items():
        cure = _not_text(name, value) or _as_system(name, value)
        if cure and name != "system" and name not in ignore and value not in (None, "", [], {}):
            raise Unread(name, f"the column {name} is not read: {cure}, or data.ignore=[{name}] if it says nothing")


def with_cure(bad: BadRow, row: Json) -> BadRow:
    """A fault of a row whose shape nobody knows, with its columns and what to type."""
    if bad.reason not in _UNSURE or isinstance(bad, NotUsed):
        return bad
    words = _mapping(row) if bad.reason != "wrong_type" else []
    from align.data.forms import nearest  # of rows that nothing reads alone

    form = "" if {"chosen", "rejected"} <= row.keys() else nearest(row)
    if _has_blocks(row) or form == "data.form=blocks":
        form = "data.form=blocks" if _has_blocks(row) else ""
    told = " ".join(words)
    told += (" or " if told and form else "") + form
    if not told and bad.reason != "missing_field":
        return bad
    told = told or "data.columns.NAME=COLUMN or data.format=module.function"
    return BadRow(bad.reason, f"{bad}. The row has the columns {', '.join(map(str, row)) or 'none'}; use {told}")


def _has_blocks(row: Fields) -> bool:
    """Whether a message says its content in a list of parts."""
    messages = [m for value in row.values() if isinstance(value, list) for m in value if isinstance(m, dict)]
    return any(isinstance(message.get("content"), list) for message in messages)


def _words(name: str) -> list[str]:
    """The words of a column's name, in small letters."""
    return re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _cure(name: str, value: object, record: Record) -> str:
    """Why a column must be read and what to type; "" if it need not."""
    words = _words(name)
    cure = _not_text(name, value) or _as_system(name, value)
    if cure or not words:
        return cure
    if words in (["tools"], ["functions"], ["tool"]):
        return f"use data.columns.tools={name}" if name != "tools" else "give the row as messages"
    if words[-1] in ("weight", "weights"):
        return f"use data.columns.weight={name} to draw rows by it, weight in messages to weigh their losses"
    if name.lower() in ("label", "labels") and record.kind in ("pair", "ranked"):
        return "a pair has none; use data.form or data.format if it says which answer is better"
    if name.lower() in ("score", "scores") and record.kind == "pair":
        return "use data.columns.score_chosen=COLUMN and data.columns.score_rejected=COLUMN"
    asked = name.lower() in _PROMPTS and (not has_prompt(record) or name.lower() in ("prompt", *_TURNS))
    if not asked:
        return ""
    if record.shape.startswith("text "):  # a text has no prompt, another column could hold one
        return f"use data.columns.prompt={name} with data.columns.completion=text"
    return f"use data.columns.prompt={name}" if name != "prompt" else "give it with completion, chosen or messages"


def _not_text(name: str, value: object) -> str:
    words = _words(name)
    shown = words and _MEDIA & {words[0], words[-1]} and not isinstance(value, (bool, int, float))
    return "only text is; use other data" if shown else ""


def _as_system(name: str, value: object) -> str:
    if _words(name)[:1] not in (["system"], ["sys"]) or not isinstance(value, (str, list)):
        return ""
    return f"use data.columns.system={name}" if name != "system" else "give prompt as messages"


def has_prompt(record: Record) -> bool:
    """Whether its answers are to something: not the beginning that two texts have in common, which may be chance."""
    return not all(isinstance(s, Dialogue) and s.whole and isinstance(s.prompt, str) for s in record.sides.values())


def _refuse_lost_prompt(record: Record, left: Fields) -> None:
    """Raises Unread for a pair of texts alone beside a column of words: their common beginning is chance then."""
    if record.kind != "pair" or has_prompt(record):
        return
    for name, value in left.items():
        if isinstance(value, str) and len(value.split()) > 1:
            begun = next(side.prompt for side in record.sides.values() if isinstance(side, Dialogue))
            if value.strip() not in begun:
                cure = f"use data.columns.prompt={name}, or data.ignore=[{name}] if it says nothing"
                raise Unread(name, f"the column {name} is not read and the pair has no prompt: {cure}")


def _mapping(row: Fields) -> list[str]:
    """Words that map columns of the row to the fields that it lacks."""
    given = {name.lower(): name for name in row if isinstance(name, str) and row[name] is not None}
    words = []
    if "prompt" not in given and not {"messages", "conversations"} & given.keys():
        asked = _first(given, _PROMPTS)
        if asked == given.get("instruction") and asked and "input" in given:
            asked = f"[{asked},{given['input']}]"
        words += [f"data.columns.prompt={asked}"] if asked else []
    answers = ("chosen", "rejected") if any(_first(given, (n, *_ANSWERS[n])) for n in ("chosen", "rejected")) else ()
    for field in answers or ("completion",):
        column = None if field in given else _first(given, _ANSWERS[field])
        words += [f"data.columns.{field}={column}"] if column else []
    return words


def _first(given: Fields, names: Iterable[str]) -> str | None:
    return next((given[name] for name in names if name in given), None)
