"""One process, one device: torch's AdamW, gradient clipping, autocast. The loop has already divided the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from align.config import OptimizerConfig
from align.engine.base import check_fit, clipped_norm, generator_states, parameter_groups, seed_generators
from align.engine.files import TensorFiles, file_name, saved_files
from align.engine.optimizer import OptimizerState, make_optimizer
from align.engine.world import World
from align.models.policy import Network
from align.types import PackedBatch, Stats

if TYPE_CHECKING:
    from align.engine.measuring import UnshardedGradients


class LocalEngine:
    """Holds a policy and its optimiser. value_lr_scale: learning rate of the value head over that of the rest.

    seed: of the generators after a checkpoint of several processes, whose states this one cannot take over.
    """

    def __init__(
        self,
        policy: Network,
        config: OptimizerConfig,
        precision: torch.dtype,
        value_lr_scale: float = 1.0,
        seed: int = 0,
    ):
        self.policy = policy
        self.config = config
        self.precision = precision
        self.seed = seed
        self.world = World()
        self.sharded = False
        self.parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        groups = parameter_groups(self.parameters, config, value_lr_scale)
        self.optimizer = make_optimizer(groups, config)
        self._state = OptimizerState(self.optimizer, self.parameters)

    def forward(self, batch: PackedBatch, needs: frozenset[str]) -> Stats:
        """The policy's stats in the run's precision."""
        with self.autocast():
            return self.policy(batch, needs)

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the run's precision."""
        device = self.policy.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    def backward(self, loss: Tensor, last: bool = True, keep_graph: bool = False) -> None:  # noqa: ARG002
        """Add the gradient of `loss`."""
        loss.backward(retain_graph=keep_graph)

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients, after which they are clipped to optimizer.max_grad_norm."""
        return clipped_norm(self.parameters.values(), self.config.max_grad_norm)

    def step(self, lr: float) -> None:
        """One optimiser step at this learning rate; gradients are forgotten."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, names: Sequence[str], count: int) -> UnshardedGradients:
        """See MeasuringEngine."""
        from align.engine.measuring import UnshardedGradients

        return UnshardedGradients({name: self.parameters[name] for name in names}, count, self.world)

    def moving(self, along: Mapping[str, Tensor]) -> AbstractContextManager[Callable[[float], None]]:
        """See MeasuringEngine."""
        from align.engine.measuring import moving

        return moving(self.parameters, along)

    def frozen(self, network: Network) -> Network:
        """The network as it is."""
        return network

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's state, tensor by tensor."""
        yield from sorted(self.policy.state_dict().items())

    def write(self, directory: Path) -> None:
        """model.safetensors and optimizer.safetensors."""
        for stem, state in (("model", self.model_state()), ("optimizer", self.optimizer_state())):
            save_file({k: v.contiguous() for k, v in state.items()}, directory / file_name(stem, 0, 1))

    def read(self, directory: Path) -> None:
        """Set weights, moments and generators. Raises ValueError when the checkpoint is of another model."""
        model, optimizer = (TensorFiles(saved_files(directory, stem)) for stem in ("model", "optimizer"))
        states = {name: optimizer.read(name) for name in optimizer.names()}
        if "rng|cpu" not in states:  # several processes wrote it
            before = torch.get_rng_state()
            states["rng|cpu"] = before
        self.restore({name: model.read(name) for name in model.names()}, states)
        if "rng|cpu" not in optimizer:
            counts = [int(v) for k, v in states.items() if k.endswith("|step")]
            seed_generators(self.seed, max(counts, default=0), 0)

    def model_state(self) -> dict[str, Tensor]:
        """Trainable weights by name."""
        return {n: p.detach() for n, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments and counts of each weight, and the generators' states, as flat names."""
        return self._state.tensors() | generator_states(self.policy.device)

    def restore(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Set weights, moments and generators. Raises ValueError when the checkpoint is of another model."""
        check_fit({name: tensor.shape for name, tensor in model.items()}, self.parameters)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(model[name])
        self._state.restore(optimizer)
        torch.set_rng_state(optimizer["rng|cpu"].cpu())
        if "rng|cuda" in optimizer and self.policy.device.type == "cuda":
            torch.cuda.set_rng_state(optimizer["rng|cuda"].cpu(), self.policy.device)


def learning_rate(config: OptimizerConfig, step: int, schedule_steps: int) -> float:
    """Rate of optimiser step 1, 2, ...: linear warm-up, then as the schedule says to min_lr_ratio.

    wsd: warm-up, stable, decay (MiniCPM, arXiv 2404.06395, section 4), linear here over the last decay_ratio of the
    steps. rex: (1 - t) / (1 - t / 2) of the way t that is done (Chen et al. 2021, arXiv 2107.04197). The last step of
    the schedule has lr * min_lr_ratio, and so have steps beyond it.
    """
    warmup = min(round(config.warmup_ratio * schedule_steps), schedule_steps - 1)
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, schedule_steps - warmup))
    if config.schedule == "wsd":
        falling = max(1, min(round(config.decay_ratio * schedule_steps), schedule_steps - warmup))
        shape = min(1.0, max(0, schedule_steps - step) / falling)
    elif config.schedule == "rex":
        shape = (1 - done) / (1 - done / 2)
    else:
        shape = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
