"""Numbers by the names of components, and weights of these that sum to 1: what composers, objectives and rows of data
refuse in one wording. `key` is the setting, or the field of a row, as the user types it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align.jsons import Fields

SUM_TOLERANCE = 1e-6  # of weights that are to sum to 1


def by_name(
    values: Fields, names: Sequence[str], key: str, complete: bool = True, what: str = "component"
) -> dict[str, float]:
    """Numbers by name in the order of names. Raises ValueError for a name that is none of them, a missing one with
    complete, and for what is no finite number. what: a name of `names`, in words."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{key}={values}: must be numbers by name, as in {key}.{names[0]}=1")
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(f"{key}.{unknown[0]}: no {what} has this name; there are {', '.join(names)}")
    missing = [name for name in names if name not in values]
    if complete and missing:
        raise ValueError(f"{key}.{missing[0]} is missing: each of {', '.join(names)} needs one")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{key}.{name}={value}: must be a finite number")
    return {name: float(values[name]) for name in names if name in values}


def simplex(
    values: Fields | None, names: Sequence[str], key: str, zeros: bool = True, what: str = "component"
) -> list[float]:
    """Weights [K], >= 0, that sum to 1; null: all equal. zeros: whether a weight may be 0. Raises ValueError."""
    if values is None or values == {}:
        return [1 / len(names)] * len(names)
    known = by_name(values, names, key, what=what)
    for name, value in known.items():
        if value < 0 or (value == 0 and not zeros):
            raise ValueError(f"{key}.{name}={value:g}: must be {'at least' if zeros else 'greater than'} 0")
    return summing_to_one(list(known.values()), key)


def summing_to_one(values: Sequence[float], key: str) -> list[float]:
    """The values. Raises ValueError unless their absolute values sum to 1."""
    total = math.fsum(abs(value) for value in values)
    if abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"{key}: {', '.join(f'{v:g}' for v in values)} sum to {total:g}; they must sum to 1")
    return list(values)
