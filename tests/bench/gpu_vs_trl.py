"""WPO and DPO by align and by TRL 1.16.0 side by side on one GPU: seconds, real tokens per second, MFU, memory.

    python -m tests.bench.gpu_vs_trl --shape 1b                 all weights of Llama 3.2 1B's shape
    python -m tests.bench.gpu_vs_trl --shape 8b --lora 16       LoRA on Llama 3 8B's shape
    python -m tests.bench.gpu_vs_trl --device cpu --shape nano  does it run at all: float32, CPU seconds

It has never run on a GPU: none was at hand. Needs requirements/bench.txt and no network; weights and tokens are random.
Prints a section for docs/benchmarks.md with its command; --json FILE keeps the figures. Losses and gradient norms are
compared before anything is timed, and the command fails where they differ.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from align.config import OptimizerConfig
from align.engine.local import LocalEngine
from align.models import attention
from align.models.policy import (
    ActivationCheckpointing,
    enable_activation_checkpointing,
    lora,
    own_attention_name,
    probe_layout,
)
from align.models.reference import ReferenceCache
from align.objectives.losses import Sigmoid
from align.objectives.preference import WPO
from align.packing import common_prefix_length
from align.trainers.loop import ReferenceModel, TrainContext, train_step
from align.types import Example, Layout
from tests.bench import data, measure, report, scale_table
from tests.bench.sides import BETA, Trl, in_layout, stand_in_tokenizer
from tests.bench.worker import Mismatch
from tests.conftest import plain_dpo

SHAPES = {"1b": scale_table.SHAPES[0], "8b": scale_table.SHAPES[1]}
SHAPES["nano"] = scale_table.Shape("nano", tied=True, **data.SHAPES["nano"])
_LENGTHS = {  # prompts; completions: median, sigma, limits
    "chat": ((128, 384), 300, 0.6, (32, 1024)),
    "longprompt": ((768, 1280), 200, 0.6, (32, 512)),
}
# Ids from the proxy's vocabulary: which of 128256 rows are read hardly matters.
WORKLOADS = {"quick": data.QUICK} | {n: data.Regime(n, "proxy", 32, 5, *v, f"{n} {v}") for n, v in _LENGTHS.items()}
# Relative difference of loss and gradient norm to TRL's default, and of a token's log-prob (nats) between two layouts.
# A bfloat16 has 8 bits, and a pair's log-ratio sums some hundred tokens; the nano shape is 2e-4 apart on a CPU.
TOLERANCE = {torch.float32: (1e-4, 1e-3, 1e-3), torch.bfloat16: (1e-2, 2e-2, 0.3)}
OBJECTIVES = {  # WPO's weight without a limit: TRL has none
    "wpo": WPO(BETA, Sigmoid(0.0), "sampled", None),
    "dpo": plain_dpo(beta=BETA, loss=Sigmoid(0.0)),
}
TRL = ("trl default", "trl no recompute", "trl best")
ALIGN: dict[str, tuple[Layout, ActivationCheckpointing]] = {  # the reference is cached in all of them
    "align packed": ("packed", "off"), "align": ("shared", "off"),
    "align selective": ("shared", "selective"), "align full": ("shared", "full"),
}  # fmt: skip
REFERENCE_IN_STEP = ("trl default", "trl no recompute")
OPTIMIZER = OptimizerConfig(0.0, [0.9, 0.999], 1e-8, 0.0, 1.0, "constant", 0.0, 1.0)  # rate 0: all steps are one step

METHOD = """\
Written without a GPU: whoever has one is the first to run it. A step is micro-batches from token ids, loss, backward,
clipping and fused AdamW, both sides under the same autocast. TRL's is `DPOTrainer.compute_loss` on its own collator's
batches of `--trl-batch` pairs, with transformers' SDPA; "best" has no recompute and reference log-probs precomputed.
MFU counts the plain algorithm, the same for every variant: forward, backward (2 forwards; with LoRA 1) and reference
over real tokens, without padding, sharing, recompute; "performed" what the variant does on a GPU. A forward has
2 (B t + V H c) + 2 l A s FLOP: B weights in the layers' matrices, t tokens, V H the head, c completion tokens, l
layers, A = heads x head size, s the sum of squared lengths (causal). Ratios are medians within a round.
"""


@torch.no_grad()
def models(shape: scale_table.Shape, rank: int, device: torch.device) -> tuple[Any, Any | None]:
    """Policy and reference, of different float32 weights. With LoRA no reference, and bfloat16 weights on a GPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {k: v for k, v in vars(shape).items() if k not in ("name", "tied")}
    sizes |= {"bos_token_id": 1, "eos_token_id": data.EOS, "pad_token_id": data.EOS, "max_position_embeddings": 8192}
    config = LlamaConfig(tie_word_embeddings=shape.tied, **sizes)
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if rank and device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if rank:
        model = lora(model, rank=rank, alpha=2 * rank, dropout=0.0, targets="all-linear", seed=0).to(device)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
        return model.train(), None
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.02 * float(p.std()))
    return model.train(), reference


class OnDevice(Trl):
    """TRL's collator and compute_loss on a device; optimiser and clipping are the engine's: both have equal ones."""

    def __init__(self, policy: Any, reference: Any | None, weighting: bool, device: torch.device, batch: int):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        self.policy, self.reference, self.batch = policy, reference, batch
        gpu = device.type == "cuda"
        stand_in = Dataset.from_list([{"prompt": "a ", "chosen": "a", "rejected": "a a"}])
        with tempfile.TemporaryDirectory() as scratch:  # the trainer makes its directory, writes nothing
            config = DPOConfig(
                output_dir=scratch, beta=BETA, max_length=4096, use_weighting=weighting, bf16=gpu, use_cpu=not gpu,
                report_to=[], save_strategy="no", max_steps=1, gradient_checkpointing=False,  # variants switch it
            )  # fmt: skip
            self.trainer = DPOTrainer(policy, reference, config, None, stand_in, processing_class=stand_in_tokenizer())
        if reference is None:  # a copy of the adapter that TRL would take for the reference
            policy.delete_adapter("ref")
        collate = self.trainer.data_collator
        self.trainer.data_collator = lambda pairs: {k: v.to(device) for k, v in collate(pairs).items()}

    def step(self, context: TrainContext, variant: str, pairs: Sequence[Example]) -> tuple[float, float]:
        """Loss and gradient norm of one optimiser step."""
        self.policy.config._attn_implementation = own_attention_name(self.policy)
        total = 0.0
        for start in range(0, len(pairs), self.batch):
            part = pairs[start : start + self.batch]
            with context.engine.autocast():
                loss = self.loss(variant, part) * (len(part) / len(pairs))
            loss.backward()
            total += float(loss.detach())
        norm = float(context.engine.gradient_norm())
        context.engine.step(0.0)
        return total, norm


def align_step(context: TrainContext, variant: str, pairs: Sequence[Example]) -> tuple[float, float]:
    """Loss and gradient norm of one optimiser step by align's own train_step."""
    layout, recompute = ALIGN[variant]
    model = context.engine.policy.model
    model.gradient_checkpointing_disable()
    context.engine.policy = in_layout(model, layout)
    enable_activation_checkpointing(context.engine.policy, recompute)
    metrics = train_step(replace(context, layout=layout), pairs, lr=0.0)
    return metrics["loss/total"], metrics["optimizer/gradient_norm"]


def flops(shape: scale_table.Shape, rank: int, variant: str, pairs: Sequence[Example], batch: int) -> tuple[int, int]:
    """FLOP of a step: of the plain algorithm, as METHOD has it, and those that the variant performs."""

    def forward(lengths: Sequence[int], prefixes: Sequence[int]) -> int:
        tokens = sum(lengths) - sum(prefixes)
        squares = sum(n * n for n in lengths) - sum(n * n for n in prefixes)
        layer = sum(a * b for a, b in shape.linear()) * tokens + shape.num_attention_heads * shape.head_dim * squares
        return 2 * shape.num_hidden_layers * layer

    rows = [row for pair in pairs for row in pair.rows]
    real = [len(row.token_ids) for row in rows]
    head = 2 * shape.vocab_size * shape.hidden_size * sum(int(row.targets.sum()) for row in rows)
    backward = 1 if rank else 2
    lengths, prefixes = real, []
    if variant in TRL:
        parts = [real[i : i + 2 * batch] for i in range(0, len(real), 2 * batch)]
        lengths = [max(part) for part in parts for _ in part]
    elif ALIGN[variant][0] == "shared":
        prefixes = [common_prefix_length(*(row.token_ids for row in pair.rows)) for pair in pairs]
    once = 1 + backward + (variant in REFERENCE_IN_STEP)
    # heads form their logits twice, but align's forms the gradient of a frozen one at once
    again = not (rank and variant in ALIGN)
    performed = (once + (variant in ("trl default", "align full"))) * forward(lengths, prefixes) + (once + again) * head
    return (2 + backward) * (forward(real, []) + head), performed


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds between two events around the work; without a GPU seconds of this process on the CPU."""
    if device.type != "cuda":
        return measure.timed(work)[0]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def compared(variant: str, found: Sequence[float], truth: Sequence[float], allowed: Sequence[float]) -> list[float]:
    """How far loss and gradient norm are from TRL's default, relative. Mismatch beyond what is allowed."""
    apart = [abs(a / b - 1) for a, b in zip(found, truth, strict=True)]
    if not all(a <= limit for a, limit in zip(apart, allowed, strict=True)):
        raise Mismatch(f"{variant}: loss and gradient norm {found}, of trl default {truth}; allowed {allowed} apart")
    return apart


def side_by_side(arguments: argparse.Namespace, objective: str) -> dict[str, Any]:
    """All variants of one objective, taking turns on one policy with one optimiser."""
    device, shape, batch = torch.device(arguments.device), SHAPES[arguments.shape], arguments.trl_batch
    gpu, max_tokens = device.type == "cuda", arguments.micro_batch_tokens
    precision = torch.bfloat16 if gpu else torch.float32
    *allowed, allowed_nats = TOLERANCE[precision]
    pairs = data.make_pairs(WORKLOADS[arguments.data], arguments.pairs)
    model, reference = models(shape, arguments.lora, device)
    trl = OnDevice(model, reference, objective == "wpo", device, batch)
    engine = LocalEngine(in_layout(model, "shared"), OPTIMIZER, precision)
    with torch.no_grad(), engine.autocast(), tempfile.TemporaryDirectory() as root:
        off = probe_layout(engine.policy, pairs[:2]).largest
        if not off <= allowed_nats:
            raise Mismatch(f"align: a token's log-prob differs by {off:.2g} nats between shared and padded prompts")
        cache = ReferenceCache(Path(root), "bench", precision)
        groups, names = [p.rows for p in pairs], [p.source for p in pairs]
        network = engine.policy if reference is None else in_layout(reference, "padded")  # the attention that TRL asks
        with engine.policy.as_reference() if reference is None else torch.no_grad():
            cache.fill(groups, names, network, network.layout, max_tokens, device, lambda steps, _: steps)
    trl.cache = {p.source: np.concatenate(cache(p.rows)) for p in pairs}
    context = TrainContext(engine, OBJECTIVES[objective], "shared", max_tokens, ReferenceModel(cache, None))
    variants: dict[str, dict[str, Any]] = {}
    for number in range(arguments.rounds + 1):  # the first compares, and makes the optimiser's states and the kernels
        for variant in arguments.variants[:: -1 if number % 2 else 1]:
            if reference is not None:  # the GPU keeps it only for those who ask it
                reference.to(device if variant in REFERENCE_IN_STEP else "cpu")
            step = partial(trl.step if variant in TRL else align_step, context, variant, pairs)
            gc.collect()
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            if number:
                variants[variant].setdefault("seconds", []).append(timed(step, device))
            else:
                with patch.object(attention, "_varlen", wraps=attention._varlen) as kernel:
                    found = step()
                first = next(iter(variants.values()), {"found": found})
                apart = compared(variant, found, first["found"], allowed)
                flop = flops(shape, arguments.lora, variant, pairs, batch)
                variants[variant] = {"found": found, "apart": apart, "varlen": kernel.called, "flop": flop}
            if gpu:
                variants[variant]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {"tokens": data.token_counts(pairs), "variants": variants}


def result_table(result: dict[str, Any], peak: float) -> str:
    """A line for each variant."""
    rows = []
    for name, v in result["variants"].items():
        s = measure.summary(v["seconds"])
        slow = [result["variants"][other]["seconds"] for other in ("trl default", "trl best")]
        ratios = [measure.summary(a / b for a, b in zip(x, v["seconds"], strict=True))["median"] for x in slow]
        rows.append([
            name, f"{s['median']:.3g} [{s['min']:.3g}-{s['max']:.3g}]", f"{result['tokens']['real'] / s['median']:.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            *(f"{100 * flop / s['median'] / peak:.3g} %" for flop in v["flop"]),
            f"{v['peak_gib']:.1f}" if "peak_gib" in v else "-", *(f"{apart:.0e}" for apart in v["apart"]),
            "stock" if name in TRL else "one kernel" if v["varlen"] else "by segment",
        ])  # fmt: skip
    head = ["variant", "s/step", "real tok/s", "x TRL default", "x TRL best", "MFU", "performed", "peak GiB"]
    return report.table([*head, "loss apart", "norm apart", "attention"], rows)


def main(argv: Sequence[str]) -> int:
    """Measure and print. 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all weights are trained")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=[*OBJECTIVES])
    parser.add_argument("--data", choices=WORKLOADS, help="default: chat, of the nano shape quick")
    parser.add_argument("--variants", nargs="+", choices=ALIGN, default=[*ALIGN], help="align's; TRL's are all run")
    parser.add_argument("--pairs", type=int, default=32, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl-batch", type=int, default=8, help="pairs of TRL's micro-batch")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="of align's micro-batch")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s; default: an H100's data sheet, bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args(argv)
    arguments.variants = [*TRL, *arguments.variants]
    nano = arguments.shape == "nano"
    arguments.data = arguments.data or ("quick" if nano else "chat")
    if not (nano if arguments.device == "cpu" else torch.cuda.is_available()):
        print("gpu_vs_trl needs a GPU; --device cpu --shape nano checks the code without one", file=sys.stderr)
        return 1
    if arguments.rounds < 1 or (arguments.shape == "8b" and not arguments.lora):
        parser.error("--rounds must be at least 1, and --shape 8b needs --lora 16: all of its states are 120 GiB")
    machine = measure.machine() | {"device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"}
    about = {"command": shlex.join(["python", "-m", "tests.bench.gpu_vs_trl", *argv]), "machine": machine}
    results = {name: side_by_side(arguments, name) for name in arguments.objectives}
    if arguments.json:
        figures = about | {"versions": measure.versions(), "peak": arguments.peak, "results": results}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"## {machine['device']}, {arguments.shape}, {WORKLOADS[arguments.data].about}\n")
    print(f"    {about['command']}\n\n{METHOD}")
    if arguments.device == "cpu":
        print("This is a CPU, float32 and one process's CPU seconds: the figures say nothing about a GPU.\n")
    for name, result in results.items():
        print(f"### {name.upper()}, {result['tokens']}\n\n{result_table(result, arguments.peak)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
