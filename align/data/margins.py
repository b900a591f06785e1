"""What a pair says of several objectives: margins of chosen over rejected by component, and weights of these.

A row has them in `margins`, or as `scores` of both answers whose differences they are; functions named in data.margins
compute what it lacks. They are numbers of its example, below MARGIN and WEIGHT.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from align.data.sources import BadRow
from align.data.wanted import Wanted
from align.jsons import Fields
from align.simplex import simplex
from align.types import MARGIN, WEIGHT

FIELDS = ("margins", "scores", "weights")  # of a row
_SIDES = ("chosen", "rejected")
_OFFERED = ("prompt", "completion", "finished")  # to a function, by the names of its parameters
_LARGEST = 1e30

# From prompt, completion and whether it was finished
Score = Callable[[str, str, bool], float]


def margin_numbers(
    fields: Fields, wanted: Wanted, functions: Mapping[str, str] | None, sides: Mapping[str, tuple]
) -> dict[str, float]:
    """Numbers of a pair: the margins, and with wanted.row_weights the weights, of the components an objective reads.

    fields: FIELDS of the row. functions: of data.margins. sides: (prompt, completion, finished) of chosen and rejected,
    for them. Raises BadRow if a margin is missing that must be there, or all of those of which some must, and for
    fields that hold something else.
    """
    found = {name: value for name, value in _margins(fields).items() if name in wanted.margins}
    for name, path in (functions or {}).items():
        if name in wanted.margins and name not in found:
            chosen, rejected = (_score(name, path, *sides[side]) for side in _SIDES)
            found[name] = chosen - rejected
    missing = [name for name in wanted.margins if name not in found]
    if missing and (wanted.all_margins or not found):
        name = missing[0]
        raise BadRow(
            "missing_field",
            f"margins.{name} is missing: the objective reads {', '.join(wanted.margins)}; add "
            f'"margins": {{"{name}": NUMBER}} to the row, scores of both answers, or a function by data.margins.{name}',
        )
    out = {MARGIN + name: value for name, value in found.items()}
    return out | (_weights(fields, wanted.margins) if wanted.row_weights else {})


def _margins(fields: Fields) -> dict[str, float]:
    """Margins of a row by component, those that follow from its scores among them."""
    found = _numbers(fields["margins"], "margins") if "margins" in fields else {}
    scores = fields.get("scores")
    if scores is None:
        return found
    if not isinstance(scores, Mapping) or set(scores) != set(_SIDES):
        raise BadRow("wrong_type", "scores must hold chosen and rejected, each an object of finite numbers")
    chosen, rejected = (_numbers(scores[side], f"scores.{side}") for side in _SIDES)
    both = [name for name in chosen if name in rejected]
    twice = [name for name in both if name in found]
    if twice:
        raise BadRow("wrong_type", f"margins.{twice[0]} is given and scores.chosen.{twice[0]} too; keep one of them")
    return found | {name: chosen[name] - rejected[name] for name in both}


def _weights(fields: Fields, names: tuple[str, ...]) -> dict[str, float]:
    """Weights of a row's components."""
    known = _numbers(fields["weights"], "weights") if "weights" in fields else {}
    if not known:
        raise BadRow("missing_field", "weights is missing: objective.weights=row reads a weight of each component")
    try:
        shares = simplex(known, names, "weights")
    except ValueError as error:
        raise BadRow("wrong_type", str(error)) from None
    return {WEIGHT + name: share for name, share in zip(names, shares, strict=True)}


@lru_cache
def scoring(path: str, key: str) -> Score:
    """A function of data.margins by its dotted path. Raises ValueError, naming the setting, if it cannot be called."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}={path}: cannot be imported ({' '.join(str(error).split())[:200]})") from error
    try:
        asked = list(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # it cannot be called, or does not tell its parameters
        asked = []
    if "completion" not in asked or not set(asked) <= set(_OFFERED):
        raise ValueError(f"{key}={path}: must be a function of completion, and of prompt and finished if it asks")

    def score(prompt: str, completion: str, finished: bool) -> float:
        offered = {"prompt": prompt, "completion": completion, "finished": finished}
        return found(**{name: offered[name] for name in asked})

    return score


def _score(name: str, path: str, prompt: str, completion: str, finished: bool) -> float:
    score = scoring(path, f"data.margins.{name}")
    try:
        value = score(prompt, completion, finished)
    except Exception as error:  # a function of the user's may raise anything; the row is what it needs to know
        raise BadRow("bad_score", f"data.margins.{name}={path} raised {type(error).__name__}: {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow("bad_score", f"data.margins.{name}={path} returned {value!r}; it must be a finite number")
    return float(value)


def _numbers(values: Any, field: str) -> dict[str, float]:
    good = isinstance(values, Mapping) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < _LARGEST
        for v in values.values()
        if v is not None  # data sets in columns fill each object up with null
    )
    if not good:
        raise BadRow("wrong_type", f"{field} must be an object of finite numbers, a name of a component for each")
    return {str(name): float(v) for name, v in values.items() if v is not None}
