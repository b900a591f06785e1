"""What a loop needs of an engine, and what engines share: groups of weights, seeds of generators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.config import OptimizerConfig, OwnOptimizerConfig
from align.engine.world import World
from align.models import Network
from align.types import PackedBatch, Stats


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


class Engine(Protocol):
    """Holds a policy and its optimiser, alone or with other processes.

    In a run of several processes every process makes the same calls in the same order; only what the batches hold
    may differ. A process that does not come is a PeerLost in the others.
    """

    policy: Network
    parameters: dict[str, nn.Parameter]  # the trained weights, by their names in the policy
    world: World
    precision: torch.dtype  # of matrix products: float32 or bfloat16
    sharded: bool  # whether this process holds shards of the weights between calls

    def forward(self, batch: PackedBatch, needs: frozenset[str]) -> Stats:
        """The policy's stats in the run's precision. Every process calls it equally often."""
        ...

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the run's precision."""
        ...

    def backward(self, loss: Tensor, last: bool = True, keep_graph: bool = False) -> None:
        """Add the gradient of this process's share of the step's loss, divided by the counts of the whole step.

        Gradients sum over micro-batches and over processes; nothing is averaged. last: it is the step's last
        micro-batch. keep_graph: another backward through it follows, of a Gradients. Every process calls it equally
        often, with a loss of zero weight where it has no rows left.
        """
        ...

    def gradient_norm(self) -> float:
        """Global norm of the step's gradient, the same number on every process; inf or nan if it is not finite.

        Called once between the last backward and step. No weight has been touched. What step uses is clipped to
        optimizer.max_grad_norm; the number is that before clipping.
        """
        ...

    def step(self, lr: float) -> None:
        """One optimiser step at this learning rate; gradients are forgotten."""
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

    def frozen(self, network: Network) -> Network:
        """A network that is not trained, such as a reference, to be asked beside the policy: in shards where the policy
        is. Every process calls it equally often."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of policy.state_dict(), heads among them, whole, on the policy's device.

        By its names, in their order; only some live at a time. Every process iterates to the end and drops what it does
        not want.
        """
        ...

    def write(self, directory: Path) -> None:
        """This process's part of the checkpoint into a directory that all processes see; returns when it is written.

        Trained weights, moments and counts as whole float32 tensors, whatever the number of processes and the stage;
        and the state of this process's generators.
        """
        ...

    def read(self, directory: Path) -> None:
        """Set weights, moments and generators from what any engine with any number of processes wrote.

        The same engine with as many processes goes on bit for bit; with another number, generators are seeded anew.
        Raises ValueError when the checkpoint is of another model; nothing is changed then.
        """
        ...


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, value_lr_scale: float
) -> list[dict[str, Any]]:
    """Groups of an optimiser: matrices, which decay, the rest, and a value head with a learning rate of its own."""
    value = [p for n, p in parameters.items() if n.startswith("value_head.")]
    policy_only = [p for n, p in parameters.items() if not n.startswith("value_head.")]
    decay = [p for p in policy_only if len(shape_of(p)) > 1]
    rest = [p for p in policy_only if len(shape_of(p)) <= 1]  # norms and biases are not decayed
    own = isinstance(config, OwnOptimizerConfig)  # decays by the key beside it, or as it does by itself
    found = [
        {"params": decay, "scale": 1.0} | ({} if own else {"weight_decay": config.weight_decay}),
        {"params": rest, "scale": 1.0, "weight_decay": 0.0},
        {"params": value, "scale": value_lr_scale, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def shape_of(p: nn.Parameter) -> torch.Size:
    """The shape of a whole weight, also while this process holds only its shard."""
    return getattr(p, "ds_shape", p.shape)  # DeepSpeed leaves an empty tensor in its place


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for a process that finds no state of its own in a checkpoint."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


class WholeGradients:
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
    """See Engine.moving: of weights, or shards of them, that begin with as many numbers as `along` has."""
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
