"""data.columns: which columns of the user's hold our fields. What the fields then mean is shapes.py's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.sources import BadRow
from align.jsons import Fields, Json

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
# the field that holds it, where a row may have a column of that name that means something else
_FIELDS = {"weight": "sampling_weight"}
_UNREAD = ("image", "images", "video", "videos", "audio", "audios")
_NOTHING = object()


def check_names(columns: object) -> None:
    """Raises ValueError for names that are no fields of ours, and for what cannot be a column."""
    if columns is None:
        return
    if not isinstance(columns, dict):
        raise ValueError(f"data.columns={columns}: must be fields with their columns; use data.columns.prompt=question")
    for name, column in columns.items():
        if name in _UNREAD:
            raise ValueError(f"data.columns.{name}: must be a field of text; use other data, or data.ignore=[{column}]")
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, 1)
            tip = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"data.columns.{name}: must be one of {', '.join(NAMES)}{tip}")
        listed = _listed(column)
        if not listed or not all(isinstance(part, str) and part for part in listed):
            raise ValueError(f"data.columns.{name}={column}: must be a column or a list of columns; use [a,b]")


class Columns:
    """The mapping at work on one source: it remembers which columns it has met, so that a wrong name is told."""

    def __init__(self, columns: Mapping[str, str | list[str]] | None):
        self._columns = {name: _listed(column) for name, column in (columns or {}).items()}
        self._unmet = {(name, path) for name, paths in self._columns.items() for path in paths}
        self._known: dict[str, None] = {}  # every column of the rows so far, in their order

    def mapped(self, row: Json) -> Json:
        """The row with our fields in the place of the columns that hold them; of an object that is read in part the
        rest stays. Raises BadRow."""
        if not self._columns:
            return row
        self._known |= dict.fromkeys(row)
        found = {name: self._found(name, paths, row) for name, paths in self._columns.items()}
        rest = row
        for path in (path for paths in self._columns.values() for path in paths):
            rest = _without(rest, path)
        return rest | {_FIELDS.get(name, name): value for name, value in found.items() if value is not _NOTHING}

    def check(self, where: str) -> None:
        """Raises ValueError for a column that no row of the source had."""
        for name, path in sorted(self._unmet):
            raise ValueError(f"{where}: {self._missing(name, path)}")

    def _found(self, name: str, paths: Sequence[str], row: Json) -> Any:
        values: Json = {}
        for path in paths:
            value = _at(row, path)
            if value is not _NOTHING:
                self._unmet.discard((name, path))
                values[path] = value
        if not values:
            raise BadRow("missing_field", self._missing(name, paths[0]))
        if len(paths) == 1:
            return values[paths[0]]
        for path, value in values.items():
            if not isinstance(value, (str, type(None))):
                raise BadRow(
                    "wrong_type",
                    f"data.columns.{name}={_written(paths)}: {path} must be a string to be joined, found "
                    f"{type(value).__name__}",
                )
        return "\n\n".join(value for value in values.values() if value and value.strip()) or None

    def _missing(self, name: str, path: str) -> str:
        near = difflib.get_close_matches(path, list(self._known), 1)
        tip = f"; did you mean {near[0]}?" if near else ""
        return (
            f"data.columns.{name}={_written(self._columns[name])}: the rows have no column {path!r}, only "
            f"{', '.join(self._known) or 'none'}{tip}"
        )


def _listed(column: object) -> list[Any]:
    return column if isinstance(column, list) else [column]


def _written(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


def _at(row: Fields, path: str) -> Any:
    """What stands in a column; dots reach into objects, and a number is a place in a list, from 0 or from the end."""
    if path in row:  # a column may have dots in its own name
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdecimal() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        elif value is None:  # null has no parts, and is no other name
            return None
        else:
            return _NOTHING
    return value


def _without(row: Json, path: str) -> Json:
    """The row without what a path has read."""
    first, *rest = [path] if path in row else path.split(".")
    left = _less(row.get(first), rest)
    return {
        name: (left if name == first else value) for name, value in row.items() if name != first or left is not None
    }


def _less(value: object, path: Sequence[str]) -> Any:
    """What is left of a value; None where nothing is."""
    if not path:
        return None
    if isinstance(value, dict):
        left = {name: _less(inner, path[1:]) if name == path[0] else inner for name, inner in value.items()}
        return left if any(inner is not None for inner in left.values()) else None
    if isinstance(value, list):
        at = int(path[0]) % len(value)
        rest = [_less(inner, path[1:]) if i == at else inner for i, inner in enumerate(value)]
        return rest if any(inner is not None for inner in rest) else None
    return None
