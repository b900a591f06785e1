"""What is measured: regimes of pair lengths, seeded random pairs, and the models they run through.

Pairs are token ids, so lengths are exact and no tokenizer is timed. Nothing here knows who is
measured.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.packing import num_tokens
from align.types import Example, Prompt, Row

EOS = 2  # last token of every completion, and TRL's padding


@dataclass(frozen=True)
class Regime:
    """One workload: a model, pairs per step, and how long prompts and completions are (tokens)."""

    name: str
    model: str  # key of SHAPES, or "smollm2"
    num_pairs: int  # per optimiser step
    rounds: int  # alternations to measure
    prompt: tuple[int, int]  # uniform, both ends included
    median: float  # of the log-normal completion length
    sigma: float  # of its logarithm
    completion: tuple[int, int]  # limits the length is clipped to
    about: str

    @property
    def vocabulary(self) -> int:
        """Token ids that pairs may use."""
        return 49152 if self.model == "smollm2" else SHAPES[self.model]["vocab_size"]


# proxy: the head is about 21 % of the matrix products, as in Llama-3.2-1B and SmolLM2-135M.
SHAPES: dict[str, dict[str, int]] = {
    "proxy": dict(
        hidden_size=384, num_hidden_layers=8, intermediate_size=1024, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, vocab_size=10240,
    ),
    "nano": dict(
        hidden_size=128, num_hidden_layers=3, intermediate_size=344, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, vocab_size=4096,
    ),
}  # fmt: skip

_MIXED = ((128, 256), 110, 0.7, (32, 256))

REGIMES = {
    regime.name: regime
    for regime in (
        Regime("mixed", "proxy", 4, 3, *_MIXED, "proxy; prompts 128-256, completions 32-256"),
        Regime("equal", "proxy", 2, 3, (128, 128), 128, 0.0, (128, 128),
               "proxy; prompts 128, completions 128: nothing to gain from packing"),
        Regime("short", "proxy", 2, 3, (128, 256), 64, 0.6, (32, 256),
               "proxy; prompts 128-256, completions 32-256, median 64"),
        Regime("long", "proxy", 2, 2, (64, 128), 320, 0.6, (64, 768),
               "proxy; prompts 64-128, completions 64-768, median 320"),
        Regime("smollm2", "smollm2", 1, 2, *_MIXED,
               "SmolLM2-135M-Instruct; prompts 128-256, completions 32-256"),
    )
}  # fmt: skip

QUICK = Regime("quick", "nano", 2, 1, (16, 32), 24, 0.7, (8, 64), "smoke test, says nothing")


def make_pairs(regime: Regime, num_pairs: int, seed: int = 0) -> list[Example]:
    """Pairs of random tokens with the regime's lengths, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def length() -> int:
        value = regime.median * float(np.exp(regime.sigma * rng.standard_normal()))
        return int(np.clip(round(value), *regime.completion))

    def tokens(num: int) -> list[int]:
        return rng.integers(10, regime.vocabulary - 10, size=num).tolist()

    pairs = []
    for i in range(num_pairs):
        prompt = tokens(int(rng.integers(regime.prompt[0], regime.prompt[1] + 1)))
        chosen, rejected = (_row(prompt, tokens(length() - 1) + [EOS]) for _ in range(2))
        prompt = Prompt(tuple(chosen.token_ids[: int(np.argmax(chosen.targets))].tolist()), "")
        pairs.append(Example((chosen, rejected), f"random:{i}", prompt, "random"))
    return pairs


def _row(prompt: list[int], completion: list[int]) -> Row:
    ids = np.array(prompt + completion, dtype=np.int32)
    return Row(ids, np.arange(len(ids)) >= len(prompt))


def token_counts(pairs: list[Example]) -> dict[str, int]:
    """Tokens of a step: real, padded to the longest row, with shared prompts, targets."""
    rows = [row for pair in pairs for row in (pair.rows[0], pair.rows[1])]
    return {
        "real": sum(len(row.token_ids) for row in rows),
        "padded": len(rows) * max(len(row.token_ids) for row in rows),
        "shared": sum(num_tokens(pair.rows, "shared") for pair in pairs),
        "completion": sum(int(row.targets.sum()) for row in rows),
    }


def reference_model(name: str) -> Any:
    """The frozen network: random and made in memory, or SmolLM2 from the user's cache; float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name == "smollm2":
        from align.models.smollm2 import smollm2_directory

        path = smollm2_directory(Path.home() / ".cache" / "align")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=EOS,
                pad_token_id=EOS,
                **SHAPES[name],
            )  # fmt: skip
        )
    return model.eval().requires_grad_(False)


def policy_model(reference: Any) -> Any:
    """A trainable copy, moved by 2 % of each weight's spread: log-ratios are not zero."""
    return _perturb(copy.deepcopy(reference))


def policy_model_alone(name: str) -> Any:
    """The same policy when nothing else keeps the reference in memory."""
    return _perturb(reference_model(name))


@torch.no_grad()
def _perturb(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.02 * float(p.std()))
    return model.train().requires_grad_(True)
