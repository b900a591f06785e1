"""The optimiser of one process, AdamW or a class of the user's own, and its state as flat tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from align.config import OptimizerConfig, OwnOptimizerConfig
from align.jsons import Json

_KINDS = {"bool": bool, "int": int, "float": float}


def make_optimizer(groups: list[Json], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or what optimizer._target_ names, called as (groups, lr=...) with the keys beside it.

    Raises ValueError for one that is no torch.optim.Optimizer, or that does not take its keys.
    """
    if not isinstance(config, OwnOptimizerConfig):
        betas = (config.betas[0], config.betas[1])
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    module, _, name = config.target.rpartition(".")
    made = getattr(import_module(module), name)
    try:
        found = made(groups, lr=config.lr, **config.keys)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer ({config.target}): {' '.join(str(error).split())}") from error
    if not isinstance(found, torch.optim.Optimizer):
        raise ValueError(f"optimizer._target_={config.target}: must make a torch.optim.Optimizer; inherit from it")
    return found


class OptimizerState:
    """What a checkpoint keeps of an optimiser: each weight's state as NAME|KEY, and what it changed of its groups.

    A number is a tensor named NAME|KEY#int, #float or #bool; NAME|KEY#cpu is a tensor kept beside a weight on a GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]):
        self.optimizer = optimizer
        self.parameters = parameters
        self._made = [dict(group) for group in optimizer.param_groups]

    def tensors(self) -> dict[str, Tensor]:
        """Raises ValueError for state that is neither a tensor nor a number."""
        out = {}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                beside = "#cpu" if isinstance(value, Tensor) and p.is_cuda and not value.is_cuda else ""
                out |= _flat(f"{name}|{key}{beside}", value)
        for i, (group, made) in enumerate(zip(self.optimizer.param_groups, self._made, strict=True)):
            for key, value in group.items():
                if key not in ("params", "lr") and value is not made.get(key) and value != made.get(key):
                    out |= _flat(f"group:{i}|{key}", value)
        return out

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Set what `tensors` gave."""
        states: dict[str, Json] = {}
        for full, value in saved.items():
            owner, _, key = full.rpartition("|")
            key, _, kind = key.partition("#")
            states.setdefault(owner, {})[key] = self._value(value, owner, kind)
        for name, p in self.parameters.items():
            if name in states:
                self.optimizer.state[p] = states[name]
        for i, group in enumerate(self.optimizer.param_groups):
            group.update(states.get(f"group:{i}", {}))

    def _value(self, value: Tensor, owner: str, kind: str) -> Any:
        if kind in _KINDS:
            return _KINDS[kind](value.item())
        p = self.parameters.get(owner)
        # a fused optimiser keeps its count beside the weights
        return value.clone() if p is None or kind == "cpu" or not (value.ndim or p.is_cuda) else value.to(p.device)


def _flat(name: str, value: object) -> dict[str, Tensor]:
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: value}
    kind = type(value).__name__
    if kind not in _KINDS:
        raise ValueError(f"optimizer._target_: its state {name} is of type {kind}; keep tensors and numbers only")
    dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}[kind]
    return {f"{name}#{kind}": torch.tensor(value, dtype=dtype)}
