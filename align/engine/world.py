"""The processes of a run and what they tell each other: numbers and small objects, never weights.

A launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun does. Every process runs the
same code on the same examples; only forwards and backwards are divided. Nothing here waits for ever.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


class PeerLost(RuntimeError):
    """Another process of the run died, or did not come to where this one waits for it."""


T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run; by default this one alone, and then each of these calls costs nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its node: the number of its GPU
    # gloo, on the host: what is told here is small, and the same code serves CPU and GPU
    group: Any = field(default=None, compare=False)

    @property
    def lead(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64 and in the order of ranks: the same on all of them."""
        if self.size == 1:
            return list(values)
        return [sum(column) for column in zip(*self.gather([float(v) for v in values]), strict=True)]

    def gather(self, value: T) -> list[T]:
        """Each process's value, by rank, on all of them."""
        if self.size == 1:
            return [value]
        out: list[T] = [value] * self.size
        with peer_lost("gather", every=True):
            dist.all_gather_object(out, value, group=self.group)
        return out

    def share(self, value: T) -> T:
        """The lead's value, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        with peer_lost("share", every=True):
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            self.gather(None)


def together(world: World, work: Callable[[], T]) -> T:
    """Let every process do its work; when one of them fails, all of them raise the error of the first that did."""
    if world.size == 1:
        return work()
    out, error = None, None
    try:
        out = work()
    except PeerLost:
        raise
    except Exception as raised:
        error = raised
    found = next((e for e in world.gather(_sendable(error)) if e is not None), None)
    if found is not None:
        raise error if error is not None else found
    return cast("T", out)


def by_lead(world: World, work: Callable[[], object]) -> Any:
    """Let the lead alone do its work; None on the others. When it fails, all raise."""
    return together(world, work if world.lead else lambda: None)


def divided(
    world: World, items: Sequence[Item], work: Callable[[Sequence[Item], int], Sequence[Result]]
) -> list[Result]:
    """A result for each item, in order, on all processes. work: does consecutive items, the first of which has this
    place; it is not called for none. When it fails anywhere, all raise."""
    first, last = (len(items) * rank // world.size for rank in (world.rank, world.rank + 1))
    own = together(world, lambda: list(work(items[first:last], first)) if last > first else [])
    return [result for part in world.gather(own) for result in part]


def _sendable(error: Exception | None) -> Exception | None:
    """An error that another process can raise; one whose class does not travel becomes a RuntimeError of its words."""
    if error is None:
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        kind = OSError if isinstance(error, OSError) else ValueError if isinstance(error, ValueError) else RuntimeError
        return kind(str(error))


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(timeout_s: float) -> World:
    """Meet the other processes that the launcher started; alone without a launcher, or with one process.

    timeout_s: how long any process waits for another, at each meeting. Raises PeerLost if they do not come.
    """
    if not launched():
        return World()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    with peer_lost("rendezvous", every=True):
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, local_rank, group)


def leave() -> None:
    """Give up the process groups; after an error the others learn of it at once."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def peer_lost(where: str, every: bool = False) -> Iterator[None]:
    """Inside, what torch says of a lost connection becomes a PeerLost that says where. every: whatever it says, where
    nothing but the connection can fail."""
    try:
        yield
    except PeerLost:
        raise
    except (RuntimeError, dist.DistError) as error:
        if every or isinstance(error, dist.DistError) or _LOST.search(str(error)):
            said = " ".join(str(error).split())[:300]
            raise PeerLost(f"at {where}: another process of the run died or did not come ({said})") from error
        raise


# gloo's and NCCL's words; an error of the model itself keeps its own
_LOST = re.compile(r"gloo|NCCL|ProcessGroup|[Cc]onnection (closed|reset|refused)|Timed out waiting|Broken pipe")
