"""Settings to an engine."""

from __future__ import annotations

import math
import socket

import torch

from align.config import Config
from align.engine.base import Engine, shape_of
from align.engine.local import LocalEngine
from align.engine.settings import offload_bytes, offload_problem
from align.engine.world import World
from align.models.device import available_bytes
from align.models.policy import Network


def make_engine(
    config: Config, policy: Network, precision: torch.dtype, world: World, value_lr_scale: float = 1.0
) -> Engine:
    """The engine of a run's settings.

    Raises ValueError for engine=local with several processes, and for more offloading than the host has memory for.
    """
    if config.engine.stage is None:
        if world.size > 1:
            raise ValueError(
                f"engine=local is one process and {world.size} were started; use engine=zero2, or launch one process"
            )
        return LocalEngine(policy, config.optimizer, precision, value_lr_scale, config.seed)
    _check_offload(config, policy, world)
    from align.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(policy, config.optimizer, config.engine, precision, world, value_lr_scale, config.seed)


def _check_offload(config: Config, policy: Network, world: World) -> None:
    settings = config.engine
    if not (settings.offload_optimizer or settings.offload_parameters):
        return
    sizes = [(math.prod(shape_of(p)), p.requires_grad) for p in policy.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, wanted in sizes if wanted)
    here = world.gather(socket.gethostname()).count(socket.gethostname())
    assert settings.stage is not None
    need = offload_bytes(
        settings.stage, settings.offload_optimizer, settings.offload_parameters, total, trained, world.size, here
    )
    # one node's shortage is every process's error
    problems = world.gather(offload_problem(need, available_bytes(torch.device("cpu"))))
    if any(problems):
        raise ValueError(next(filter(None, problems)))
