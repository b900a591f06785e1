"""What a loop needs of an engine, and what engines share: groups of weights, seeds of generators."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from align.config import OptimizerConfig, OwnOptimizerConfig
from align.engine.world import World
from align.jsons import Json
from align.models.policy import Network
from align.types import PackedBatch, Stats


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

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of this process's share of the step's loss, divided by the counts of the whole step.

        Gradients sum over micro-batches and over processes; nothing is averaged. last: it is the step's last
        micro-batch. Every process calls it equally often, with a loss of zero weight where it has no rows left.
        """
        ...

    def gradient_norm(self) -> Tensor:
        """Global norm of the step's gradient, one number, the same on every process; inf or nan if it is not finite. It
        may still be computed on the device: whoever reads it waits.

        Called once between the last backward and step. No weight has been touched. What step uses is clipped to
        optimizer.max_grad_norm; the number is that before clipping.
        """
        ...

    def step(self, lr: float) -> None:
        """One optimiser step at this learning rate; gradients are forgotten."""
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
) -> list[Json]:
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


def clipped_norm(parameters: Collection[nn.Parameter], limit: float | None) -> Tensor:
    """Global norm of gradients that are whole in this process, which are then clipped to `limit`. Nothing is read."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=None)
    if limit is not None:  # by 1 where it is not finite: no step is taken then, and what is wrong can be looked for
        finite = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, finite)
    return norm


def shape_of(p: nn.Parameter) -> torch.Size:
    """The shape of a whole weight, also while this process holds only its shard."""
    return getattr(p, "ds_shape", p.shape)  # DeepSpeed leaves an empty tensor in its place


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for a process that finds no state of its own in a checkpoint."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def generator_states(device: torch.device, end: str = "") -> dict[str, Tensor]:
    """States of torch's generators by their names in a checkpoint, which end so for one process of many."""
    out = {f"rng|cpu{end}": torch.get_rng_state()}
    if device.type == "cuda":
        out[f"rng|cuda{end}"] = torch.cuda.get_rng_state(device)
    return out


def check_fit(saved: Mapping[str, Sequence[int]], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError when saved weights, shapes by name, are not those of this model."""
    odd = sorted(saved.keys() ^ parameters.keys())
    if odd:
        raise ValueError(f"the checkpoint belongs to another model: it differs in {odd[0]}; use another run.dir")
    for name, p in parameters.items():
        if tuple(saved[name]) != tuple(shape_of(p)):
            raise ValueError(
                f"the checkpoint belongs to another model: {name} is {list(saved[name])} there and "
                f"{list(shape_of(p))} here; use another run.dir"
            )
