"""The tables of docs/scale.md: memory and communication on paper, by the formulas below. Nothing here is measured.

python -m tests.bench.scale_table            # prints them
python -m tests.bench.scale_table --write    # puts them into docs/scale.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from align.engine.settings import offload_bytes
from align.models.device import memory_plan
from align.models.policy import ActivationCheckpointing

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
BEGIN, END = "<!-- begin: python -m tests.bench.scale_table --write -->\n", "<!-- end -->\n"

GIB = 1 << 30
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEMORIES = (24, 80, 139)  # GiB of a GPU
USABLE = 0.8  # of it, as models.device.pick_activation_checkpointing leaves; the rest: tiles, buckets, fragments, CUDA
TOKENS = 8192  # of a micro-batch on one GPU
RANK = 16  # of LoRA, on all linear layers
GATHERED = 1e9  # weights that ZeRO-3 holds whole at a time: DeepSpeed 0.19.8's stage3_max_live_parameters
NODE = 8  # GPUs of a node
# Bytes per second at the narrowest place of a ring: NVLink of an H100 or H200 one way (data sheet: 900 GB/s both ways);
# the network of a node with eight links of 400 Gb/s, or with one. A ring through all GPUs enters each node once.
NVLINK, EIGHT_LINKS, ONE_LINK = 450e9, 400e9, 50e9
# FLOP/s: the H100's data sheet (dense bfloat16) times what torchtitan publishes for Llama 3.1 8B, 33 to 39 %
# (benchmarks/llama3_h100_202412_torchtitan.md@31a17bf)
SPEED = 0.35 * 989e12


@dataclass(frozen=True)
class Shape:
    """A Llama: what memory_plan and the counts below read of its config."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices: q, k, v, o, gate, up, down."""
        h, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    def weights(self) -> int:
        """All weights: matrices, two norms a layer, the last norm, embeddings and head."""
        layer = sum(a * b for a, b in self.linear()) + 2 * self.hidden_size
        table = self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + self.hidden_size + table * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Weights of LoRA on every linear layer."""
        return self.num_hidden_layers * rank * sum(a + b for a, b in self.linear())

    def activations(self, recompute: ActivationCheckpointing, tokens: int) -> int:
        """Bytes that align's own estimate counts for a micro-batch in bfloat16."""
        return memory_plan(self, 0, tokens, torch.bfloat16).activations[recompute]

    def cache_per_token(self) -> int:
        """Bytes of keys and values in bfloat16 that an engine keeps of a token."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


# The shapes of Llama 3.2 1B, Llama 3 8B and Llama 3 70B.
SHAPES = (
    Shape("1B", 2048, 8192, 16, 32, 8, 64, 128256, True),
    Shape("8B", 4096, 14336, 32, 32, 8, 128, 128256, False),
    Shape("70B", 8192, 28672, 80, 64, 8, 128, 128256, False),
)


@dataclass(frozen=True)
class Plan:
    """A way to train in bfloat16, and the bytes of weights, gradients and AdamW's states on each of G GPUs."""

    name: str
    gpu: Callable[[Shape, int], float]
    offload: bool = False  # the rest is in the host's memory
    gathered: float = 0.0  # bytes of each weight that is whole for the moment, where weights lie in shards


# Bytes of a trained weight. Weights are float32 whatever the precision of matrix products is; for these autocast makes
# a bfloat16 copy, which torch keeps during the forward (align/engine/local.py, align/engine/deepspeed.py).
WEIGHT, COPY, GRADIENT, MOMENTS = 4, 2, 4, 8
FROZEN = 2  # bytes of a frozen weight under LoRA: model.dtype=bfloat16


def replicated(shape: Shape, _gpus: int) -> float:
    """engine=local on one GPU, zero0 on each: every process holds everything."""
    return (WEIGHT + COPY + GRADIENT + MOMENTS) * shape.weights()


def replicated_lora(shape: Shape, _gpus: int) -> float:
    """The same with LoRA: the frozen model, and all that training needs for the adapter only."""
    return FROZEN * shape.weights() + (WEIGHT + COPY + GRADIENT + MOMENTS) * shape.adapter(RANK)


def zero1(shape: Shape, gpus: int) -> float:
    """Moments in shards (Rajbhandari et al. 2020, arXiv 1910.02054, section 5.1, with the bytes above).

    DeepSpeed 0.19.8 copies its shard of the weights, float32 ones too: runtime/zero/stage_1_and_2.py,
    single_partition_of_fp32_groups.
    """
    return (WEIGHT + COPY + GRADIENT + (WEIGHT + MOMENTS) / gpus) * shape.weights()


def zero2(shape: Shape, gpus: int) -> float:
    """Gradients in shards as well (section 5.2)."""
    return (WEIGHT + COPY + (GRADIENT + WEIGHT + MOMENTS) / gpus) * shape.weights()


def zero3(shape: Shape, gpus: int) -> float:
    """Weights in shards as well (section 5.3). float32 shards are updated in place, without a copy: DeepSpeed 0.19.8,
    runtime/zero/stage3.py, fp32_partitioned_groups_flat."""
    return (WEIGHT + GRADIENT + MOMENTS) / gpus * shape.weights()


def zero3_lora(shape: Shape, gpus: int) -> float:
    """The frozen model in shards, and the adapter's."""
    return (FROZEN * shape.weights() + (WEIGHT + GRADIENT + MOMENTS) * shape.adapter(RANK)) / gpus


def zero2_offload(shape: Shape, _gpus: int) -> float:
    """Weights stay, gradients leave as they come (ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840, section 3)."""
    return (WEIGHT + COPY) * shape.weights()


def zero3_offload(shape: Shape, gpus: int) -> float:
    """Shards of the weights stay."""
    return WEIGHT / gpus * shape.weights()


PLANS = (
    Plan("local, zero0", replicated),
    Plan("local, zero0, LoRA 16", replicated_lora),
    Plan("zero1", zero1),
    Plan("zero2", zero2),
    Plan("zero3", zero3, gathered=WEIGHT + COPY),
    Plan("zero3, LoRA 16", zero3_lora, gathered=FROZEN),
    Plan("zero2, offload_optimizer", zero2_offload, offload=True),
    Plan("zero3, offload_optimizer", zero3_offload, offload=True, gathered=WEIGHT + COPY),
    Plan("zero3, both offloads", lambda _shape, _gpus: 0.0, offload=True, gathered=WEIGHT + COPY),
)


def traffic(stage: int, trained: float, frozen: float, gpus: int, micro_batches: int) -> float:
    """Bytes that each of G GPUs sends in an optimiser step of so many micro-batches (arXiv 1910.02054, section 7): to
    reduce n numbers to shards, or to gather n from shards, each sends n (G - 1) / G of them around a ring.

    zero0 reduces the gradients and gathers the sum, once; zero1 gathers the new weights instead. zero2 keeps no whole
    gradients and reduces them after each micro-batch (DeepSpeed 0.19.8, runtime/engine.py, allreduce_gradients). zero3
    gathers all weights, frozen ones too, in each forward and in each backward, and reduces the gradients; what a layer
    gathers to be computed again is taken to serve its backward (stage3_max_reuse_distance).
    """
    if stage < 2:
        numbers = (GRADIENT + WEIGHT) * trained
    elif stage == 2:
        numbers = (micro_batches * GRADIENT + WEIGHT) * trained
    else:
        numbers = micro_batches * ((2 * WEIGHT + GRADIENT) * trained + 2 * FROZEN * frozen)
    return numbers * (gpus - 1) / gpus


def hiding_tokens(bytes_per_second: float, lora: bool = False) -> float:
    """Tokens of a micro-batch on each GPU whose compute takes as long as zero3's traffic on many GPUs.

    A weight costs 6 FLOP a token (forward 2, backward 4) and 12 bytes a micro-batch; a frozen one, which has no
    gradient of its own, 4 and 4. The size of the model cancels.
    """
    flop, size = (4, 2 * FROZEN) if lora else (6, 2 * WEIGHT + GRADIENT)
    return size / bytes_per_second * SPEED / flop


def smallest(plan: Plan, shape: Shape, memory_gib: int) -> str:
    """The least of GPUS on which states and a micro-batch with full recompute fit."""
    room = USABLE * memory_gib * GIB - shape.activations("full", TOKENS)
    room -= plan.gathered * min(GATHERED, shape.weights())
    return next((str(g) for g in GPUS if plan.gpu(shape, g) <= room), "-")


def size(value: float) -> str:
    """Bytes in GiB."""
    gib = value / GIB
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.1f}" if gib >= 0.1 else f"{gib:.2f}"


def gigabytes(value: float) -> str:
    """Bytes in GB."""
    value /= 1e9
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def seconds(value: float) -> str:
    """Seconds with two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]] + [""]


def lines() -> list[str]:
    """All tables."""
    return [*state_lines(), *activation_lines(), *smallest_lines(), *host_lines(), *traffic_lines(), *rollout_lines()]


def state_lines() -> list[str]:
    """Weights, gradients and optimiser."""
    plans = [plan for plan in PLANS if not plan.offload]
    rows = [[s.name, plan.name, *(size(plan.gpu(s, g)) for g in GPUS)] for s in SHAPES for plan in plans]
    head = ["model", "engine", *(f"{g} GPU{'s' if g > 1 else ''}" for g in GPUS)]
    return ["**Weights, gradients and optimiser, GiB on each GPU**", "", *table(head, rows)]


def activation_lines() -> list[str]:
    """What the backward needs of the forward."""
    rows = [[s.name, *(size(s.activations(mode, TOKENS)) for mode in ("off", "selective", "full"))] for s in SHAPES]
    what = f"Activations of a micro-batch of {TOKENS} tokens, bfloat16, GiB on each GPU"
    title = f"**{what}, by `trainer.activation_checkpointing`**"
    return [title, "", *table(["model", "off", "selective", "full"], rows)]


def smallest_lines() -> list[str]:
    """How few GPUs do."""
    rows = [[p.name, *(smallest(p, s, memory) for s in SHAPES for memory in MEMORIES)] for p in PLANS]
    title = f"**Fewest GPUs on which both fit, full recompute, {USABLE:.0%} of the memory (-: not on {GPUS[-1]})**"
    return [title, "", *table(["engine", *(f"{s.name}, {m} GiB" for s in SHAPES for m in MEMORIES)], rows)]


def host_lines() -> list[str]:
    """Memory of a node outside its GPUs, by the estimate that align itself refuses a run by."""
    counts = (1, NODE, 2 * NODE, 4 * NODE)
    rows = []
    for shape in SHAPES:
        n = shape.weights()
        rows.append([shape.name, *(size(offload_bytes(3, True, True, n, n, g, min(g, NODE))) for g in counts)])
    head = ["model", *(f"{g} GPU{'s' if g > 1 else ''}" for g in counts)]
    title = (
        f"**Host memory of a node of {NODE} GPUs, zero3 with both offloads, GiB (offload_optimizer alone: 5/6 of it)**"
    )
    return [title, "", *table(head, rows)]


def traffic_lines() -> list[str]:
    """Bytes and seconds of communication."""
    rows = []
    for shape in SHAPES:
        all_weights, adapter = shape.weights(), shape.adapter(RANK)
        for name, stage, trained, frozen, micro_batches in (
            ("zero0, zero1", 1, all_weights, 0, 1),
            ("zero2, 4 micro-batches", 2, all_weights, 0, 4),
            ("zero3, each micro-batch", 3, all_weights, 0, 1),
            ("zero3, LoRA 16, each micro-batch", 3, adapter, all_weights, 1),
        ):
            inside, across = (traffic(stage, trained, frozen, g, micro_batches) for g in (NODE, 256))
            times = [seconds(inside / NVLINK), seconds(across / EIGHT_LINKS), seconds(across / ONE_LINK)]
            rows.append([shape.name, name, gigabytes(inside), times[0], gigabytes(across), *times[1:]])
    head = ["model", "engine", "8 GPUs, GB", "NVLink, s", "256 GPUs, GB", "8 x 400 Gb/s a node, s", "1 x 400 Gb/s, s"]
    speeds = (NVLINK, EIGHT_LINKS, ONE_LINK)
    whole, lora = (" / ".join(f"{hiding_tokens(speed, lora):.0f}" for speed in speeds) for lora in (False, True))
    return [
        "**What each GPU sends in an optimiser step, and how long that takes if nothing hides it**",
        "",
        *table(head, rows),
        f"zero3's traffic takes as long as the compute of {whole} tokens of a micro-batch on each GPU (NVLink / eight",
        f"links / one), with LoRA of {lora}, whatever the model's size, at {SPEED / 1e12:.0f} TFLOP/s. Larger",
        "micro-batches can hide it, smaller ones cannot.",
        "",
    ]


def rollout_lines() -> list[str]:
    """Memory of an engine that writes completions."""
    rows = [
        [s.name, size(2 * s.weights()), f"{s.cache_per_token() / 1024:.0f}", size(256 * 2048 * s.cache_per_token())]
        for s in SHAPES
    ]
    head = ["model", "weights, GiB", "keys and values of a token, KiB", "of 256 sequences of 2048 tokens, GiB"]
    return ["**A rollout engine's memory, bfloat16**", "", *table(head, rows)]


def written(page: str) -> str:
    """The page with the tables in their place. Raises ValueError if it has no place for them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + "\n" + "\n".join(lines()) + END + after


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(written(PAGE.read_text()))
    else:
        sys.stdout.write("\n".join(lines()))
