"""What the doctor has done in a process of its own, since it may hang or be killed: importing torch, a ping, vLLM.

    python child.py ping RANK SIZE BACKEND STORE SECONDS
    python child.py vllm SECONDS

A script that imports nothing of align. Says JSON objects, one a line. An alarm ends it if its parent does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import sys
import time
from datetime import timedelta
from typing import Any

from align.jsons import Json


def ping(rank: int, size: int, backend: str, store: str, seconds: float) -> None:
    """Join the others and add up 1 to `size`, a number from each process. Rank 0 of gloo also tells the devices."""
    import torch
    from torch import distributed

    if backend == "gloo" and rank == 0:
        say(devices=devices(torch))
    say(rank=rank, imported=True)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        store=distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    total = 0.0
    for _ in range(2):  # the first one opens connections
        start = time.perf_counter()
        value = torch.full((1024,), float(rank + 1), device=device)
        distributed.all_reduce(value)
        total = float(value.sum()) / 1024
    say(rank=rank, total=total, milliseconds=1000 * (time.perf_counter() - start))
    distributed.destroy_process_group()


def devices(torch: Any) -> Json:
    """What torch sees of GPUs."""
    cards = []
    for i in range(torch.cuda.device_count()):
        with torch.cuda.device(i):
            free, total = torch.cuda.mem_get_info()
            bfloat16 = torch.cuda.is_bf16_supported()
        cards.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total, "bfloat16": bfloat16})
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": cards}


def vllm() -> None:
    """Import vLLM and its compiled part, which fails where it was built for another torch."""
    module = importlib.import_module("vllm")
    if importlib.util.find_spec("vllm._C") is not None:
        importlib.import_module("vllm._C")
    say(version=module.__version__)


def say(**fields: object) -> None:
    """A line to the parent."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main(words: list[str]) -> None:
    """Do what the words say; errors leave as Python's own do, the parent reads their last line."""
    seconds = float(words[-1])
    signal.alarm(int(seconds) + 3)
    if words[0] == "ping":
        rank, size, backend, store = words[1:5]
        ping(int(rank), int(size), backend, store, seconds)
    else:
        vllm()


if __name__ == "__main__":
    main(sys.argv[1:])
