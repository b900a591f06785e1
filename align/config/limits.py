"""What stands beside a setting's type: its range, its choices, whether it may change when a run is resumed."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Range:
    """Bounds of a finite number; None: none on that side."""

    low: float | None = None
    high: float | None = None
    low_in: bool = True  # whether low itself is allowed
    high_in: bool = True

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'at least' if self.low_in else 'greater than'} {self.low}"
        high = "" if self.high is None else f"{'at most' if self.high_in else 'below'} {self.high}"
        return " and ".join(filter(None, (low, high)))

    def refusal(self, value: Any) -> str | None:
        """What is wrong with a value, None if nothing is."""
        below = self.low is not None and (value < self.low or (value == self.low and not self.low_in))
        over = self.high is not None and (value > self.high or (value == self.high and not self.high_in))
        return f"must be {self}" if below or over or not math.isfinite(value) else None


@dataclass(frozen=True)
class Choices:
    """The names that a text may be."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"

    def refusal(self, value: object) -> str | None:
        """What is wrong with a value, None if nothing is."""
        if value in self.names:
            return None
        near = difflib.get_close_matches(str(value), self.names, 1)
        return f"must be {self}" + (f"; did you mean {near[0]}?" if near else "")


@dataclass(frozen=True)
class Switch:
    """true, false, or one word."""

    word: str

    def __str__(self) -> str:
        return f"one of {self.word}, true, false"

    def refusal(self, value: object) -> str | None:
        """What is wrong with a value, None if nothing is."""
        return None if isinstance(value, bool) or value == self.word else f"must be {self}"


@dataclass(frozen=True)
class Resumable:
    """A resumed run may have another value. keys: of an open section these alone; none: all of it."""

    keys: tuple[str, ...] = ()


def above(low: float, at_most: float | None = None) -> Range:
    """low < x, x <= at_most."""
    return Range(low, at_most, low_in=False)


def at_least(low: float, at_most: float | None = None, below: float | None = None) -> Range:
    """low <= x, x <= at_most or x < below."""
    return Range(low, below if at_most is None else at_most, high_in=below is None)


def between(low: float, high: float) -> Range:
    """low < x < high."""
    return Range(low, high, low_in=False, high_in=False)


def one_of(*names: str) -> Choices:
    """x is one of these."""
    return Choices(names)


def switch(word: str) -> Switch:
    """x is true, false or this word."""
    return Switch(word)


resumable = Resumable()


@lru_cache
def marks(cls: type) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Each field of a dataclass of settings, with what stands beside its type."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple((name, getattr(hint, "__metadata__", ())) for name, hint in hints.items())


def refuse(section: object, prefix: str = "") -> None:
    """Raises ValueError for the first field of a dataclass of settings that its range or choices forbid."""
    for name, beside in marks(type(section)):
        value = getattr(section, name)
        if is_dataclass(value):
            refuse(value, f"{name}.")
        for mark in beside if value is not None else ():
            wrong = None if isinstance(mark, Resumable) else mark.refusal(value)
            if wrong is not None:
                raise ValueError(f"{prefix}{name}={value}: {wrong}")
