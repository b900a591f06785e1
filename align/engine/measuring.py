"""Gradients beside the optimiser's, and weights that are moved for a while: what an engine offers who measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.engine.base import Engine
from align.engine.world import World


class Gradients(Protocol):
    """Gradients of some functions of log-probs by some of the weights, summed over micro-batches and processes. They
    belong to no step: what a step has gathered is left alone."""

    def add(self, values: Tensor, cotangents: Sequence[Tensor], own: bool) -> None:
        """Those of each sum(values * cotangent); the graph is used up. own: False where the micro-batch is another
        process's and counts for nothing. Every process calls it equally often."""
        ...

    def total(self) -> list[dict[str, Tensor]]:
        """Of each function by the weights' names, without those on which it does not depend: whole and the same on all
        processes, or flat and only this process's numbers where the engine is sharded. Every process calls it once."""
        ...


@runtime_checkable
class MeasuringEngine(Engine, Protocol):
    """An engine whose weights can be differentiated by, and moved, between the calls of a step."""

    def backward(self, loss: Tensor, last: bool = True, keep_graph: bool = False) -> None:
        """See Engine. keep_graph: another backward through it follows, of a Gradients."""
        ...

    def gradients(self, names: Sequence[str], count: int) -> Gradients:
        """Gradients of `count` functions by the trained weights of these names, still 0. Where the engine is sharded:
        of one function, and none while a step's gradients are being gathered. Every process calls it."""
        ...

    def moving(self, along: Mapping[str, Tensor]) -> AbstractContextManager[Callable[[float], None]]:
        """Inside, a function that sets the trained weights to what they were plus a length times `along`, one of
        Gradients.total; afterwards they are bit for bit what they were. Every process calls the function equally
        often."""
        ...


class UnshardedGradients:
    """See Gradients: by weights that every process holds whole."""

    def __init__(self, weights: Mapping[str, nn.Parameter], count: int, world: World):
        self.weights = weights
        self.world = world
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(count)]

    def add(self, values: Tensor, cotangents: Sequence[Tensor], own: bool) -> None:
        """See Gradients."""
        if not own or not len(values):
            return
        for k, (found, cotangent) in enumerate(zip(self._sums, cotangents, strict=True)):
            more = k + 1 < len(cotangents)
            # without the weights' hooks, which are the step's
            gradients = torch.autograd.grad(
                values, list(self.weights.values()), cotangent, retain_graph=more, allow_unused=True
            )
            for name, gradient in zip(self.weights, gradients, strict=True):
                if gradient is not None:
                    found[name] = found[name].add_(gradient) if name in found else gradient.contiguous()

    def total(self) -> list[dict[str, Tensor]]:
        """See Gradients."""
        if self.world.size == 1:
            return self._sums
        everyone = self.world.gather([set(found) for found in self._sums])
        out = []
        for k, found in enumerate(self._sums):
            anywhere = set().union(*(names[k] for names in everyone))  # a process may have had no micro-batch
            whole = {}
            for name in filter(anywhere.__contains__, self.weights):
                whole[name] = found.pop(name) if name in found else torch.zeros_like(self.weights[name])
                dist.all_reduce(whole[name])
            out.append(whole)
        return out


@contextlib.contextmanager
def moving(weights: Mapping[str, Tensor], along: Mapping[str, Tensor]) -> Iterator[Callable[[float], None]]:
    """See MeasuringEngine.moving: of weights, or shards of them, that begin with as many numbers as `along` has."""
    parts = {name: weights[name].detach().view(-1)[: direction.numel()] for name, direction in along.items()}
    kept = {name: part.clone() for name, part in parts.items()}

    def move(length: float) -> None:
        for name, part in parts.items():
            torch.add(kept[name], along[name].view(-1).to(part.device), alpha=length, out=part)

    try:
        yield move
    finally:
        for name, part in parts.items():
            part.copy_(kept[name])
