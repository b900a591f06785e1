"""data.columns: which columns of the user's hold our fields. What the fields then mean is shapes.py's."""

from __future__ import annotations

import difflib

NAMES = (
    "prompt",
    "system",
    "chosen",
    "rejected",
    "completion",
    "label",
    "messages",
    "tools",
    "score_chosen",
    "score_rejected",
    "weight",
)
_UNREAD = ("image", "images", "video", "videos", "audio", "audios")


def check_names(columns: object) -> None:
    """Raises ValueError for names that are no fields of ours, and for what cannot be a column."""
    if columns is None:
        return
    if not isinstance(columns, dict):
        raise ValueError(f"data.columns={columns}: must be fields with their columns; use data.columns.prompt=question")
    for name, column in columns.items():
        if name in _UNREAD:
            raise ValueError(f"data.columns.{name}: must be a field of text; use data.ignore=[{column}], or other data")
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, 1)
            tip = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"data.columns.{name}: must be one of {', '.join(NAMES)}{tip}")
        listed = column if isinstance(column, list) else [column]
        if not listed or not all(isinstance(part, str) and part for part in listed):
            raise ValueError(f"data.columns.{name}={column}: must be a column or a list of columns; use [a,b]")
