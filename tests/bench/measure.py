"""Clocks, memory and summaries: how things are measured, whatever they are."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def limit_threads() -> None:
    """One thread in this process. Call before torch is used."""
    import torch

    torch.set_num_threads(1)


# Read by libraries when they are loaded, hence set by the parent of a measuring process.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
    "CUDA_VISIBLE_DEVICES": "",
}


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """-> CPU seconds of this process, wall seconds, what `work` returned."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return time.process_time() - cpu, time.perf_counter() - wall, value


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, least and largest of some measurements."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def settle_memory() -> None:
    """Give freed memory back to the system, so that what is resident now is what is in use."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reset_peak() -> None:
    """Start the peak of resident memory anew (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mib(peak: bool = False) -> float:
    """Resident memory, now or its peak since `reset_peak` (Linux: proc(5), status)."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def machine() -> dict[str, str]:
    """The hardware in words, without names of hosts or users."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = set(info.get("flags", "").split())
    vector = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "no AVX")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{info.get('model name', platform.machine())}, family "
        f"{info.get('cpu family', '?')} model {info.get('model', '?')}, {vector}",
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("torch", "transformers", "trl", "accelerate", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
