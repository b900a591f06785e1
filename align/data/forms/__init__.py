"""Shapes of rows that need a rule, by name: data.form=NAME. A form makes of rows others in the fields of formats.py.

What needs no rule is shapes.py's, which columns are meant is mapping.py's.
"""

from __future__ import annotations

from align.config.limits import Choices
from align.data.formats import parse
from align.data.forms import answers, blocks, compared, tasks
from align.data.forms.base import Form, Placed
from align.data.sources import BadRow, NotUsed
from align.jsons import Json

__all__ = ["FORMS", "Form", "Placed", "named", "nearest"]

FORMS: dict[str, Form] = {form.name: form for form in (*tasks.FORMS, *answers.FORMS, *compared.FORMS, *blocks.FORMS)}


def named(name: str, key: str) -> Form:
    """The form of that name. Raises ValueError, naming the key and the nearest form, if there is none."""
    wrong = Choices(tuple(FORMS)).refusal(name)
    if wrong is not None:
        raise ValueError(f"{key}: {wrong}; `align data forms` shows an example of each")
    return FORMS[name]


def nearest(row: Json) -> str:
    """The words to type for a row that nothing else reads: of the forms that read it the one that reads most of its
    columns; "" if none does."""
    fitting = [form for form in FORMS.values() if _fits(form, row)]
    best = max(fitting, key=lambda form: len(row.keys() & set(form.columns)), default=None)
    return "" if best is None else f"data.form={best.name}"


def _fits(form: Form, row: Json) -> bool:
    """Whether the form makes of it a row that can be learnt from, or leaves it out without fault."""
    for _, made in form.rows([("", row)], ignore=row):
        try:
            if not isinstance(made, BadRow):
                parse(made, open_tool_calls=True)
            elif not isinstance(made, NotUsed):
                return False
        except BadRow:
            return False
    return True
