"""Columns that nothing reads: those that change what a row means are refused with the words to type, others told.

Which fields a row has is formats.py's; a field that stands here was read by nothing.
"""

from __future__ import annotations

import re
from collections.abc import Container

from align.data.formats import Dialogue, Record, Tokenised
from align.data.shapes import is_conversation
from align.data.sources import BadRow
from align.jsons import Fields

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
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "user_prompt", "user", "request", "input")
PROMPTS += ("inputs", "context", "instructions", "questions", *_TURNS)
# Which of two answers is better, and who speaks: beside answers that are named, or beside a text, they are lost.
_VERDICTS = ("label", "labels", "winner", "preference", "preferred", "flipped", "swapped")
_SPEAKERS = ("role", "speaker", "author", "sender", "replies")


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
    if name.lower() in _VERDICTS and record.kind in ("pair", "ranked"):
        return "a pair has none; use data.form or data.format if it says which answer is better"
    if name.lower() in _SPEAKERS and record.shape.startswith("text "):
        return "it says who speaks, and a text is learnt as a whole; use data.format=module.function to give messages"
    if name.lower() in ("score", "scores") and record.kind == "pair":
        return "use data.columns.score_chosen=COLUMN and data.columns.score_rejected=COLUMN"
    asked = name.lower() in PROMPTS and (not has_prompt(record) or name.lower() in ("prompt", *_TURNS))
    if not asked:
        return ""
    if has_prompt(record) and name.lower() in _TURNS:
        return "use data.format=module.function to put its turns before the prompt"
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
    """Raises Unread for a pair of texts alone beside a column of words or messages: what they begin with is chance."""
    if record.kind != "pair" or has_prompt(record):
        return
    for name, value in left.items():
        said = isinstance(value, str) and len(value.split()) > 1
        if said or is_conversation(value):
            begun = next(side.prompt for side in record.sides.values() if isinstance(side, Dialogue))
            if not said or str(value).strip() not in begun:
                cure = f"use data.columns.prompt={name}, or data.ignore=[{name}] if it says nothing"
                raise Unread(name, f"the column {name} is not read and the pair has no prompt: {cure}")
