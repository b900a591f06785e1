"""How one tensor of the average comes from those of the models: span by span, so that memory has a bound.

The mathematics is in methods.py. Sums run in float64 and are rounded once: there the sum of float32 or narrower weights
is exact but for rare extremes, so that neither the order of the models nor copies of one show in the result. In float32
the mean of three copies of one tensor already differs from it in every seventh entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from align.averaging.files import FLOATS, Entry, Model
from align.averaging.methods import offsets_gram, stitch, stock, stock_ratio, uniform_mean, weighted_sum

# Float tensors that are no weights: rotary frequencies, running statistics, whose mean belongs to no network.
_NO_WEIGHTS = ("inv_freq", "running_mean", "running_var")


@dataclass(frozen=True)
class Inputs:
    """One set of tensors in all models, read in spans whose working memory stays below `limit` bytes."""

    models: tuple[Model, ...]
    stem: str
    limit: int

    def entries(self, key: str) -> list[Entry]:
        """The tensor in each model."""
        return [model.sets[self.stem][key] for model in self.models]

    def spans(self, key: str, unit: int = 1) -> Iterator[tuple[int, int]]:
        """From and to, in elements, in multiples of `unit`; at least one unit each."""
        size = self.entries(key)[0].size
        # eight bytes for the tensor, its offset or mask and a temporary of each model, and four of the result
        most = self.limit // (8 * (3 * len(self.models) + 4))
        step = max(most // unit, 1) * unit
        for start in range(0, size, step):
            yield start, min(start + step, size)

    def read(self, key: str, start: int, stop: int) -> list[Tensor]:
        """A span of each model in float64. Raises ValueError for NaN or infinity."""
        out = []
        for model, entry in zip(self.models, self.entries(key), strict=True):
            span = entry.read(start, stop)
            if not bool(torch.isfinite(span).all()):
                raise ValueError(f"{model.path}: {key} holds NaN or infinity; leave this model out")
            out.append(span.double())
        return out


class Combine(Protocol):
    """A method of averaging."""

    def __call__(self, inputs: Inputs, key: str) -> Iterator[Tensor]:
        """The spans of one tensor of the result, in float64."""
        ...


class Uniform:
    """The mean: summed first, divided once."""

    def __call__(self, inputs: Inputs, key: str) -> Iterator[Tensor]:
        """Spans."""
        for span in inputs.spans(key):
            yield uniform_mean(inputs.read(key, *span))


@dataclass(frozen=True)
class Weighted:
    """A weighted sum; weights: key -> one number a model."""

    weights: Callable[[str], Sequence[float]]

    def __call__(self, inputs: Inputs, key: str) -> Iterator[Tensor]:
        """Spans."""
        for span in inputs.spans(key):
            yield weighted_sum(inputs.read(key, *span), self.weights(key))


def by_weights(weights: Sequence[float]) -> Combine:
    """The mean or a weighted sum, the same for every tensor."""
    return Uniform() if all(w == 1 / len(weights) for w in weights) else Weighted(lambda _: weights)


@dataclass(frozen=True)
class Stock:
    """Model Stock; the first model is the base."""

    filter_wise: bool
    clamp: bool

    def __call__(self, inputs: Inputs, key: str) -> Iterator[Tensor]:
        """Spans. A ratio of the whole tensor needs its dot products first: the tensor is read twice."""
        shape = inputs.entries(key)[0].shape
        if self.filter_wise and len(shape) > 1:
            width = max(shape[-1], 1)
            for start, stop in inputs.spans(key, width):
                base, *tuned = (x.view(-1, width) for x in inputs.read(key, start, stop))
                ratio = stock_ratio(offsets_gram(base, tuned), self.clamp).unsqueeze(-1)
                yield stock(base, tuned, ratio).flatten()
            return
        gram = torch.zeros((), dtype=torch.float64)
        for span in inputs.spans(key):
            base, *tuned = inputs.read(key, *span)
            gram = gram + offsets_gram(base, tuned)
        if gram.dim() == 0:  # a tensor without elements
            return
        ratio = float(stock_ratio(gram, self.clamp))
        for span in inputs.spans(key):
            base, *tuned = inputs.read(key, *span)
            yield stock(base, tuned, ratio)


@dataclass(frozen=True)
class Localized:
    """Dataless localize-and-stitch; the first model is the base. least: for each other one the smallest change kept."""

    least: tuple[float, ...]

    @classmethod
    def of(cls, sets: Sequence[Inputs], density: float) -> Localized:
        """Find what each model's top entries are, over all its tensors."""
        return cls(tuple(_kth_change(sets, i, density) for i in range(1, len(sets[0].models))))

    def __call__(self, inputs: Inputs, key: str) -> Iterator[Tensor]:
        """Spans."""
        for span in inputs.spans(key):
            base, *tuned = inputs.read(key, *span)
            changes = [(x - base).float().abs() for x in tuned]
            masks = [(c >= least) & (c > 0) for c, least in zip(changes, self.least, strict=True)]
            yield stitch(base, tuned, masks)


def average_of(inputs: Inputs, combine: Combine, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """The spans of one tensor of the result. What is no weight must be identical in all models and is copied.

    Raises ValueError for what differs, and for numbers that the type cannot hold.
    """
    if not is_weight(key, inputs.entries(key)[0]):
        yield from _identical(inputs, key)
        return
    for wide in combine(inputs, key):
        span = wide.to(dtype)
        if not bool(torch.isfinite(span).all()):
            cure = "use dtype=bfloat16 or float32" if dtype == torch.float16 else "use clamp=true or weights in [0, 1]"
            raise ValueError(f"{key}: the average exceeds the range of {str(dtype).removeprefix('torch.')}; {cure}")
        yield span


def is_weight(key: str, entry: Entry) -> bool:
    """Whether a tensor is averaged, not copied."""
    return entry.dtype in FLOATS and not key.endswith(_NO_WEIGHTS)


def _identical(inputs: Inputs, key: str) -> Iterator[Tensor]:
    entries = inputs.entries(key)
    for start, stop in inputs.spans(key):
        first = entries[0].read(start, stop)
        for model, entry in zip(inputs.models[1:], entries[1:], strict=True):
            other = entry.read(start, stop)
            if other.dtype != first.dtype or not torch.equal(other.view(torch.uint8), first.view(torch.uint8)):
                raise ValueError(
                    f"{key} is no weight and differs between {inputs.models[0].path} and {model.path}; it has no "
                    "average: use models of one configuration"
                )
        yield first


def _kth_change(sets: Sequence[Inputs], number: int, density: float) -> float:
    """The k-th largest |x - base| of a model over all tensors, as float32, in two readings and constant memory.

    Bits of positive floats are ordered as the numbers: the upper half is counted first, then the lower half of those
    that share the upper half of the k-th.
    """
    total = 0
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in _change_bits(sets, number):
        upper += torch.bincount(bits >> 16, minlength=1 << 16)
        total += bits.numel()
    rank = max(1, int(density * total))
    high, rank = _kth(upper, rank)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in _change_bits(sets, number):
        lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low, _ = _kth(lower, rank)
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))


def _kth(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bucket of the rank-th largest, and its rank among those of the bucket."""
    above = counts.flip(0).cumsum(0)
    place = int((above >= rank).nonzero()[0])
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def _change_bits(sets: Sequence[Inputs], number: int) -> Iterator[Tensor]:
    for inputs in sets:
        two = Inputs((inputs.models[0], inputs.models[number]), inputs.stem, inputs.limit)
        for key, entry in inputs.models[0].sets[inputs.stem].items():
            if is_weight(key, entry):
                for span in two.spans(key):
                    base, x = two.read(key, *span)
                    yield (x - base).float().abs().view(torch.int32).long()
