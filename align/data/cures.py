"""What to type for a row whose shape nobody knows: the columns that hold our fields, or the form that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from align.data.shapes import conversation, is_conversation
from align.data.sources import BadRow, NotUsed
from align.data.unread import PROMPTS
from align.jsons import Fields, Json

# Other names of our fields in public sets; the first that is there is offered.
_ANSWERS = {
    "chosen": (
        "chosen_response",
        "preferred",
        "preferred_output",
        "preferred_response",
        "better",
        "positive",
        "accepted",
    )
    + ("accept", "win", "winner", "good", "best", "pos", "y_w"),
    "rejected": ("rejected_response", "dispreferred", "non_preferred_output", "rejected_output", "worse", "negative")
    + ("reject", "lose", "loser", "bad", "worst", "neg", "y_l"),
    "completion": ("response", "output", "answer", "solution", "target", "reply", "generation", "assistant"),
}
_READ = ("messages", "conversations", "conversation")  # without being named
_FIELDS = ("prompt", "chosen", "rejected", "completion", *_READ)
_SAID = ("text", "content", "value")  # of an object that holds what the column's own name promises
_UNSURE = ("missing_field", "assistant_first", "empty_prompt", "wrong_type")  # reasons that another reading may cure


def with_cure(bad: BadRow, row: Json) -> BadRow:
    """A fault of a row whose shape nobody knows, with its columns and what to type."""
    if bad.reason not in _UNSURE or isinstance(bad, NotUsed):
        return bad
    told = " ".join(mapping(row))
    from align.data.forms import nearest  # of rows that nothing reads alone

    form = "" if all(_usable(row.get(name)) for name in ("chosen", "rejected")) else nearest(row)
    if _has_blocks(row) or form == "data.form=blocks":
        form = "data.form=blocks" if _has_blocks(row) else ""
    told += (" or " if told and form else "") + form
    if not told and bad.reason == "wrong_type" and any(_odd(row.get(name)) for name in _FIELDS):
        told = "data.format=module.function"
    if not told and bad.reason != "missing_field":
        return bad
    told = told or "data.columns.NAME=COLUMN or data.format=module.function"
    return BadRow(bad.reason, f"{bad}. The row has the columns {', '.join(map(str, row)) or 'none'}; use {told}")


def mapping(row: Fields) -> list[str]:
    """The words that map columns of the row to the fields that it lacks; a column is told by its name and by what it
    holds."""
    paths = _paths(row)
    found: Json = {}
    pair = any(_first(paths, (field, *_ANSWERS[field])) for field in ("chosen", "rejected"))
    for field in ("chosen", "rejected") if pair else ("completion",):
        plain = _ANSWERS["completion"] if field == "chosen" and "rejected" in paths else ()
        found[field] = _first(paths, (field, *_ANSWERS[field], *plain))
    named = _first(paths, PROMPTS)
    others = [path for path in paths.values() if path not in ("chosen", "rejected", *found.values())]
    asked = named or next((path for path in others if is_conversation(row.get(path))), None)
    answered = any(found.values())
    if not answered and asked is not None and _ends_in_answer(_at(row, asked)):
        found = {"messages": asked}
    elif asked in ("instruction", "Instruction") and "input" in paths:
        found = {"prompt": f"[{asked},{paths['input']}]"} | found
    else:
        found = {"prompt": asked} | found
    labels = [name for name, value in row.items() if isinstance(value, bool)]
    if found.get("completion") and len(labels) == 1 and "label" not in row:
        found["label"] = labels[0]
    return [f"data.columns.{field}={path}" for field, path in found.items() if path and path not in (field, *_READ)]


def _paths(row: Fields) -> dict[str, str]:
    """By its name in small letters where each column stands that can be a field: itself, the only one of a list, or
    what stands in an object."""
    paths = {str(name).lower(): str(name) for name, value in row.items() if _usable(value)}
    for name, value in row.items():
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            paths.setdefault(str(name).lower(), f"{name}.0")
        for key, inner in value.items() if isinstance(value, Mapping) else ():
            if _usable(inner):
                paths.setdefault(str(name if key in _SAID else key).lower(), f"{name}.{key}")
    return paths


def _usable(value: object) -> bool:
    """Whether it can stand where a text or messages may."""
    return isinstance(value, str) or is_conversation(value)


def _odd(value: object) -> bool:
    """Whether it is neither text nor objects: numbers, lists of texts."""
    return value is not None and not isinstance(value, str) and not (isinstance(value, list) and _objects(value))


def _objects(value: list[Any]) -> bool:
    return all(isinstance(part, Mapping) for part in value)


def _ends_in_answer(value: object) -> bool:
    return is_conversation(value) and conversation(value)[-1]["role"] == "assistant"


def _at(row: Fields, path: str) -> Any:
    first, _, rest = path.partition(".")
    value = row.get(path, row.get(first))
    return value[int(rest) if isinstance(value, list) else rest] if rest and path not in row else value


def _has_blocks(row: Fields) -> bool:
    """Whether a message says its content in a list of parts."""
    messages = [m for value in row.values() if isinstance(value, list) for m in value if isinstance(m, dict)]
    return any(isinstance(message.get("content"), list) for message in messages)


def _first(given: Fields, names: Iterable[str]) -> str | None:
    return next((given[name] for name in names if name in given), None)
