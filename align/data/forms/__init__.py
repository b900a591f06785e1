"""Shapes of rows that need a rule, by name: data.form=NAME. A form makes of rows others in the fields of formats.py.

What needs no rule is shapes.py's, which columns are meant is mapping.py's.
"""

from __future__ import annotations

from collections.abc import Iterable

from align.config.limits import Choices
from align.data.forms import answers, blocks, compared, tasks
from align.data.forms.base import Form, Placed

__all__ = ["FORMS", "Form", "Placed", "named", "nearest"]

FORMS: dict[str, Form] = {form.name: form for form in (*tasks.FORMS, *answers.FORMS, *compared.FORMS, *blocks.FORMS)}


def named(name: str, key: str) -> Form:
    """The form of that name. Raises ValueError, naming the key and the nearest form, if there is none."""
    wrong = Choices(tuple(FORMS)).refusal(name)
    if wrong is not None:
        raise ValueError(f"{key}: {wrong}; `align data forms` shows an example of each")
    return FORMS[name]


def nearest(columns: Iterable[str]) -> str:
    """The words to type for rows that hold these columns and none of ours; "" if none would read them.

    A form is known by the columns of its example: it is one whose columns are all there, the most of them, else the
    one that reads most, two at least.
    """
    held = set(columns)
    whole = [form for form in FORMS.values() if set(form.example[0]) <= held]
    if whole:
        return f"data.form={max(whole, key=lambda form: len(form.example[0])).name}"
    best = max(FORMS.values(), key=lambda form: len(held & set(form.columns)))
    return f"data.form={best.name}" if len(held & set(best.columns)) >= 2 else ""
