"""One node's part of a ping between nodes, in a process of its own since it may hang.

    python ping.py RANK SIZE ADDRESS PORT SECONDS

A script that imports nothing of align. Says JSON objects, one a line. An alarm ends it if its parent does not.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from datetime import timedelta


def main(rank: int, size: int, address: str, port: int, seconds: float) -> None:
    """Join the others at the address and add up 1 to `size`, a number from each, over NCCL or else gloo."""
    end = time.monotonic() + seconds
    signal.alarm(int(seconds) + 3)
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    say(stage="imported torch", backend=backend, devices=torch.cuda.device_count())
    if rank > 0:
        reach(address, port, end)
    say(stage="come to the meeting point")
    if cuda:
        torch.cuda.set_device(0)
    distributed.init_process_group(
        backend,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=max(1.0, end - time.monotonic())),
    )
    say(stage="met the others")
    for _ in range(2):  # the first one opens connections
        start = time.perf_counter()
        value = torch.full((1024,), float(rank + 1), device="cuda" if cuda else "cpu")
        distributed.all_reduce(value)
        total = float(value.sum()) / 1024
    say(stage="added up", total=total, milliseconds=1000 * (time.perf_counter() - start))
    distributed.destroy_process_group()


def reach(address: str, port: int, end: float) -> None:
    """Wait until something listens there. Raises OSError if nothing does."""
    while True:
        try:
            socket.create_connection((address, port), timeout=3).close()
            return
        except OSError as error:
            if time.monotonic() > end - 5:
                raise OSError(f"cannot reach {address}:{port}: {error}") from None
        time.sleep(0.2)


def say(**fields: object) -> None:
    """A line to the parent."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
