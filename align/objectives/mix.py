"""A weighted sum of two objectives over the same examples. Nested, of any number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from align.deferred import Tensor, torch
from align.objectives.base import Objective, as_objective
from align.objectives.checks import positive_value
from align.types import Kind, Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class Mix(Objective):
    """first_weight * first + second_weight * second; each term keeps its own denominator.

    The parts are objectives of one kind; one of kind single joins pairs and then reads their chosen row. At most one
    of them may need values of the whole step. A metric of the second whose name the first has too is prefixed second_.
    """

    first: Objective
    second: Objective
    first_weight: float
    second_weight: float

    def __post_init__(self) -> None:
        positive_value("objective.first_weight", self.first_weight)
        positive_value("objective.second_weight", self.second_weight)
        as_objective(self.first, "objective.first")
        as_objective(self.second, "objective.second")
        kinds = {self.first.kind, self.second.kind}
        if len(kinds) > 1 and kinds != {"pair", "single"}:
            raise ValueError(
                f"objective.first={type(self.first).__name__} reads {self.first.kind} examples and "
                f"objective.second={type(self.second).__name__} {self.second.kind} ones: they cannot be mixed"
            )
        if self.first.step_rows and self.second.step_rows:
            names = " and ".join(type(part).__name__ for part in self._parts)
            raise ValueError(f"objective.first and objective.second: {names} both need values of the whole step")

    @property
    def kind(self) -> Kind:
        """pair if one of the parts reads pairs, else that of both."""
        return "pair" if "pair" in (self.first.kind, self.second.kind) else self.first.kind

    @property
    def needs(self) -> frozenset[str]:
        """What either part needs."""
        return self.first.needs | self.second.needs

    @property
    def extras(self) -> frozenset[str]:
        """What either part names."""
        return self.first.extras | self.second.extras

    @property
    def columns(self) -> tuple[str, ...]:
        """Further rows of either part, each once."""
        return tuple(dict.fromkeys((*self.first.columns, *self.second.columns)))

    @property
    def margins(self) -> tuple[str, ...]:
        """Components of either part, each once."""
        return tuple(dict.fromkeys(name for part in self._parts for name in part.margins))

    @property
    def all_margins(self) -> bool:
        """Whether a part needs all of its own."""
        return any(part.all_margins for part in self._parts if part.margins)

    @property
    def row_weights(self) -> bool:
        """Whether a part reads weights of the rows."""
        return any(part.row_weights for part in self._parts)

    @property
    def step_rows(self) -> Literal["examples", "mismatched"] | None:
        """Of the part that needs values of the whole step, None without one."""
        return self.first.step_rows or self.second.step_rows

    def step_values(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Tensor:
        """Of the part that needs them."""
        part = self.first if self.first.step_rows else self.second
        return part.step_values(policy, reference, self._view(part, batch) if self.step_rows == "examples" else batch)

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:
        """The terms of both parts, weighted, and the metrics of both."""
        terms: list[Term] = []
        metrics: dict[str, Tensor] = {}
        by_origin: list[str] = []
        for part, weight in zip(self._parts, (self.first_weight, self.second_weight), strict=True):
            out = part(policy, reference, self._view(part, batch))
            columns = self._columns_of(part)
            for term in out.terms:
                column = None if term.column is None else columns[term.column]
                terms.append(replace(term, weight=weight * term.weight, column=column))
            names = {name: f"second_{name}" if name in metrics else name for name in out.metrics}
            metrics |= {names[name]: values for name, values in out.metrics.items()}
            by_origin += [names[name] for name in out.by_origin]
        return Losses(tuple(terms), metrics, tuple(by_origin))

    @property
    def _parts(self) -> tuple[Objective, Objective]:
        return self.first, self.second

    def _columns_of(self, part: Objective) -> list[int]:
        """Where the mix's groups hold the columns that a part expects."""
        own = 2 if self.kind == "pair" else 1
        return [*range(own), *(own + self.columns.index(name) for name in part.columns)]

    def _view(self, part: Objective, batch: PackedBatch) -> PackedBatch:
        index = torch.tensor(self._columns_of(part), device=batch.groups.device)
        return replace(batch, groups=batch.groups.index_select(1, index))
