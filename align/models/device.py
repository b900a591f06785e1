"""What the machine can do: the device, fast bfloat16 or not, memory, and the activation checkpointing that fits it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.models.policy import ActivationCheckpointing


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and why. auto measures: on some CPUs bfloat16 is 59 times slower than float32."""
    if wanted != "auto":
        return getattr(torch, wanted), "set by trainer.precision or by this run's first start"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16, "the GPU has bfloat16"
    speeds = {dtype: _matmul_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    ratio = speeds[torch.float32] / speeds[torch.bfloat16]
    # a factor of 1.3 pays for the casts of weights that autocast adds
    chosen = torch.bfloat16 if ratio > 1.3 else torch.float32
    return chosen, f"bfloat16 runs at {ratio:.2g} times the speed of float32 here"


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    a, b = torch.ones(64, 512, dtype=dtype, device=device), torch.ones(512, 512, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best


def available_bytes(device: torch.device) -> int:
    """Memory that may still be taken: of the GPU, or of the host within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = {k.rstrip(":"): int(v) * 1024 for k, v, *_ in (line.split() for line in lines)}
    out = free.get("MemAvailable", 8 << 30)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        out = min(out, int(limit.read_text()) - int(used.read_text()))
    return out


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes of a step beyond the weights that are already loaded."""

    states: int  # gradients and optimiser moments
    activations: dict[ActivationCheckpointing, int]


def memory_plan(config: Any, num_trained: int, tokens: int, precision: torch.dtype) -> MemoryPlan:
    """Estimate for a Llama-like model of this config and micro-batches of so many tokens.

    Counted per layer and token, in units of the compute dtype: what the backward needs of norms, projections,
    attention and the gated MLP; norms keep a float32 copy.
    """
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv = 2 * head_dim * (getattr(config, "num_key_value_heads", None) or heads)
    q = heads * head_dim
    size = torch.finfo(precision).bits // 8
    everything = size * (4 * hidden + 3 * q + 3 * kv + 4 * inner) + 4 * 4 * hidden
    products = size * (3 * hidden + 2 * q + kv + 2 * inner)
    boundary = size * hidden
    return MemoryPlan(
        states=num_trained * (4 + 8),
        activations={
            "off": layers * tokens * everything,
            "selective": tokens * (layers * (products + boundary) + everything),
            "full": tokens * (layers * boundary + everything),
        },
    )


def pick_activation_checkpointing(wanted: str, plan: MemoryPlan, available: int) -> tuple[ActivationCheckpointing, str]:
    """off, selective or full: the first whose estimate leaves a fifth of the free memory. With the reason."""
    gib = 1 << 30
    if wanted != "auto":
        return wanted, "set by trainer.activation_checkpointing or by this run's first start"  # type: ignore[return-value]
    for mode, need in plan.activations.items():
        total = plan.states + need
        if total <= 0.8 * available or mode == "full":
            return mode, f"estimated {total / gib:.1f} GiB for a step, {available / gib:.1f} GiB free"
    raise AssertionError("full is always reached")
