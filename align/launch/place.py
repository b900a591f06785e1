"""Where this process stands: one of a run, the launcher of a node, or alone; and how many a run has on this machine."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from align.config import Config

# What a process of a run is told by a launcher, ours or torchrun.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# By what a scheduler should do: 85 start me again, 130 the user's own wish.
CODES = {signal.SIGTERM: 85, signal.SIGUSR1: 85, signal.SIGINT: 130}


@dataclass(frozen=True)
class Place:
    """This machine among those of a run, and where the processes of all meet."""

    nodes: int
    node: int
    host: str
    port: int | None  # None: a free one of this machine


def is_worker() -> bool:
    """Whether a launcher, ours or torchrun, has started this process as one of a run."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def in_job() -> bool:
    """Whether a template of launch/ has started this process as the launcher of a node."""
    return "ALIGN_NODES" in os.environ


def place(config: Config) -> Place:
    """Where this machine stands, by what the template has set; alone without one.

    Raises ValueError for variables that make no sense.
    """
    if not in_job():
        return Place(1, 0, "127.0.0.1", config.launch.port)
    try:
        nodes, node = int(os.environ["ALIGN_NODES"]), int(os.environ["SLURM_NODEID"])
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        alone = nodes == 1 and not port  # then as outside of a job
        found = Place(nodes, node, "127.0.0.1" if alone else host, None if alone else int(port))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"ALIGN_NODES is set, and with it go SLURM_NODEID, MASTER_ADDR and MASTER_PORT: {error}"
        ) from None
    if not 0 <= found.node < found.nodes:
        raise ValueError(f"SLURM_NODEID={found.node}: must be at least 0 and below ALIGN_NODES={found.nodes}")
    return found


def processes(config: Config) -> int:
    """How many processes this machine runs. Raises ValueError if the engine cannot divide a run among them."""
    engine = config.choices.get("engine", "local")
    number = config.launch.processes
    if number is None:
        number = max(1, _gpus()) if engine != "local" else 1
    check_engine(config, number, place(config).nodes)
    return number


def check_engine(config: Config, processes: int, nodes: int) -> None:
    """Raises ValueError if a run of one process would be started several times."""
    if config.choices.get("engine", "local") == "local" and processes * nodes > 1:
        what = f"launch.processes={processes}" if processes > 1 else f"launch.nodes={nodes}"
        raise ValueError(f"{what}: engine=local is one process; choose engine=zero0, zero1, zero2 or zero3")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
