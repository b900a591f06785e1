"""What is read of the data, as an objective says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.types import Kind

if TYPE_CHECKING:
    from align.objectives.base import Objective


@dataclass(frozen=True)
class Wanted:
    """What an objective reads of the data; `columns` are further rows of each pair, by name or dotted path."""

    kind: Kind | None = "pair"  # None: each row as what it is
    columns: tuple[str, ...] = ()
    mismatched: bool = False
    # every sequence with its end of turn, cut off or not: a reward model is read at the last token
    whole: bool = False
    margins: tuple[str, ...] = ()  # components whose margins a pair must have: all of them, or one at least
    all_margins: bool = True
    row_weights: bool = False  # a weight of each of them too

    @classmethod
    def by(cls, objective: Objective) -> Wanted:
        """What an objective says of it."""
        return cls(
            objective.kind,
            tuple(objective.columns),
            objective.step_rows == "mismatched",
            "scores" in objective.needs,
            tuple(objective.margins),
            objective.all_margins,
            objective.row_weights,
        )
