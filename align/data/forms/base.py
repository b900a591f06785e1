"""What a form is, and what several of them read of a row: texts, numbers, the prompt, turns of a transcript."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.sources import BadRow
from align.jsons import Json

Placed = tuple[str, Json | BadRow]  # "file:line" and its row, or why it cannot be used
Convert = Callable[[Sequence[Json]], Iterator[Json | BadRow]]

# Fields that decide what a row is (formats.py): one that a form did not make must not stand beside what it made.
_DECIDING = frozenset(
    ("prompt", "chosen", "rejected", "ranked", "completion", "label", "messages", "conversations", "text")
    + ("prompt_chosen", "prompt_rejected", "token_ids", "spans")
)
# How a transcript begins, with the name of the user and what stands before it: HH and Nectar, and others like them.
_OPENING = re.compile(r"\A\s*(?P<mark>### ?)?(?P<user>Human|User|HUMAN|USER):")
_MARK = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # in prompts of HelpSteer 2, whose first turn has none
# Where a question stands, in the order in which they are looked for; a list is joined by a blank line.
PROMPTS = (("prompt",), ("instruction", "input"), ("question",), ("problem",), ("query",), ("context",), ("history",))
PROMPTS += (("input",),)
PROMPT_COLUMNS = tuple(dict.fromkeys(name for names in PROMPTS for name in names))


@dataclass(frozen=True)
class Form:
    """One shape of rows.

    convert: rows to rows in our fields (prompt, chosen, rejected, ranked, completion, messages, system, tools, numbers
    and so on): one row, or the neighbours of one key. A BadRow among them is a row that is left out, a NotUsed one
    without fault. Raises BadRow, naming the field, for rows of another shape.
    """

    name: str
    line: str  # what it reads, with a public set that has it
    example: tuple[Json, ...]  # one row, or the rows of one key
    columns: tuple[str, ...]  # that it reads where they are there
    convert: Convert
    key: Callable[[Json], object] | None = None  # rows in succession with one key are read together

    def rows(self, placed: Iterable[Placed], ignore: Container[str] = ()) -> Iterator[Placed]:
        """The rows of a source as they are read, each at the place of the first row that it was made of.

        ignore: columns that are known not to be read.
        """
        together: list[tuple[str, Json]] = []
        for where, row in placed:
            if together and (isinstance(row, BadRow) or not self._alike(together[0][1], row)):
                yield from self._made(together, ignore)
                together = []
            if isinstance(row, BadRow):
                yield where, row
            else:
                together.append((where, row))
        if together:
            yield from self._made(together, ignore)

    def _alike(self, one: Json, other: Json) -> bool:
        return self.key is not None and self.key(one) == self.key(other)

    def _made(self, together: Sequence[tuple[str, Json]], ignore: Container[str]) -> Iterator[Placed]:
        where, first = together[0]
        silent = {name for name in _DECIDING if first.get(name) is None or name in ignore}
        beside = {name: value for name, value in first.items() if name not in self.columns and name not in silent}
        try:
            converted = list(self.convert([row for _, row in together]))
            _refuse_deciding(beside)
            for made in converted:
                yield where, made if isinstance(made, BadRow) else beside | made
        except BadRow as bad:
            yield where, type(bad)(bad.reason, f"data.form={self.name}: {bad}")


def _refuse_deciding(beside: Json) -> None:
    name = next((name for name in beside if name in _DECIDING), None)
    if name is not None:
        cure = f"use data.ignore=[{name}] if it says nothing more"
        raise BadRow("unread_column", f"the column {name} is not read and would decide what the row is; {cure}")


def single(convert: Callable[[Json], Json]) -> Convert:
    """Of a form that makes one row of each."""

    def converted(rows: Sequence[Json]) -> Iterator[Json | BadRow]:
        for row in rows:
            yield convert(row)

    return converted


def given(row: Json, name: str) -> Any:
    """A column that must be there and not null. Raises BadRow."""
    if row.get(name) is None:
        raise BadRow("missing_field", f"the column {name!r} is missing or null; the row has {', '.join(row) or 'none'}")
    return row[name]


def string(value: object, name: str) -> str:
    """A text. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{name} must be a string, found {type(value).__name__}")
    return value


def listed(value: object, name: str) -> list[Any]:
    """A list. Raises BadRow."""
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} must be a list, found {type(value).__name__}")
    return value


def number(value: object) -> float | None:
    """A finite number, also one that is written as text; None for anything else, such as "N/A"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def prompt_of(row: Json) -> object:
    """The prompt of a row: a text, or messages. Raises BadRow if no column holds one."""
    for names in PROMPTS:
        value = row.get(names[0])
        if value is None:
            continue
        if isinstance(value, dict) and isinstance(value.get("full_text"), str):  # WebGPT's question
            return value["full_text"]
        if isinstance(value, list):
            return value
        parts = [string(value, names[0]), *(string(row[k], k) for k in names[1:] if row.get(k) is not None)]
        return opened("\n\n".join(part for part in parts if part.strip()))
    raise BadRow(
        "missing_field", f"no column holds the prompt; name it: data.columns.prompt=COLUMN, of {', '.join(row)}"
    )


def opened(prompt: str) -> str | list[Json]:
    """A prompt that is a transcript, with an answer or the header of one, as messages; another as it is."""
    turns = transcript(prompt) or []
    return unanswered(turns) if any(turn["role"] == "assistant" for turn in turns) else prompt


def unanswered(turns: list[Json]) -> list[Json]:
    """Turns without the header of the answer to come."""
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def transcript(text: str) -> list[Json] | None:
    """The turns of "Human: ... Assistant: ...", white space around each taken off; None for a text that is none.

    A turn begins behind a blank line; where no answer does, behind the end of a line.
    """
    opening = _OPENING.match(text)
    if opening is None:
        return _turns(_MARK, f"<extra_id_1>User\n{text}") if _MARK.search(text) else None
    mark, user = re.escape(opening["mark"] or ""), opening["user"]
    names = f"{user}|{'ASSISTANT' if user.isupper() else 'Assistant'}"
    turns: list[Json] = []
    for gap in (r"\n\n", r"\n"):
        turns = _turns(re.compile(rf"(?:\A\s*|{gap}){mark}({names}):"), text)
        if any(turn["role"] == "assistant" for turn in turns):
            break
    return turns


def _turns(header: re.Pattern[str], text: str) -> list[Json]:
    _, *parts = header.split(text)
    said = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "assistant" if who.lower() == "assistant" else "user", "content": t.strip()} for who, t in said]
