"""Shapes of rows that need a rule, by name: data.form=NAME. A form makes of a row one in the fields of formats.py.

What needs no rule is shapes.py's, which columns are meant is mapping.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from align.data.sources import BadRow
from align.jsons import Json

Placed = tuple[str, Json | BadRow]  # "file:line" and its row, or why it cannot be read


@dataclass(frozen=True)
class Form:
    """One shape.

    convert: from a row to one in our fields, prompt, chosen, rejected, ranked, completion, label, messages, system,
    tools, numbers and so on. Columns that it does not read stand beside them as they came. Raises BadRow, naming the
    field, for a row of another shape, NotUsed for one that says nothing, such as a tie.
    join: for shapes of which several rows make one: the rows of a source to fewer, before convert sees them.
    """

    name: str
    line: str  # what it reads, in a sentence
    example: Json  # a row
    columns: tuple[str, ...]  # that it reads
    convert: Callable[[Json], Json]
    join: Callable[[Iterable[Placed]], Iterator[Placed]] | None = None


FORMS: dict[str, Form] = {}


def nearest(columns: Iterable[str]) -> str:
    """The words to type for rows that hold these columns and none of ours; "" if no form has two of them."""
    held = set(columns)
    best = max(FORMS.values(), key=lambda form: len(held & set(form.columns)), default=None)
    if best is None or len(held & set(best.columns)) < min(2, len(best.columns)):
        return ""
    return f"data.form={best.name}"
