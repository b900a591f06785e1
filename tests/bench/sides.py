"""The two things compared: a DPO loss by align and the same one by TRL 1.16, from the same pairs.

A side has a `policy` (the transformers model that is trained) and `loss(variant, pairs)`, which
does all that a step does before the backward: batch, reference, policy, objective.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from align.models.logprobs import cached_stats
from align.models.policy import Policy, own_attention_name
from align.models.reference import ReferenceCache
from align.objectives.losses import Sigmoid
from align.packing import pack, token_column
from align.types import Example, Layout
from tests.bench.data import EOS
from tests.conftest import plain_dpo

BETA = 0.1
# Tokens of one forward of the cache pass: what a step of the mixed regime has, and more.
CACHE_TOKENS = 4096

# Reference log-probs of the targets of both sequences, chosen first, by Pair.source
Cache = dict[str, np.ndarray]

TRL_VARIANTS = {
    "trl default": "as shipped: gradient checkpointing, reference forward in each step",
    "trl no recompute": "gradient_checkpointing=False",
    "trl best": "gradient_checkpointing=False, precompute_ref_log_probs=True, and the head on "
    "completion positions only (patched, see below)",
}
ALIGN_VARIANTS: dict[str, tuple[Layout, bool]] = {  # layout, reference from the cache
    "align padded": ("padded", False),
    "align packed": ("packed", False),
    "align shared": ("shared", False),
    "align": ("shared", True),
}
ALIGN_ABOUT = {
    "align padded": "rows padded to the longest, reference forward in each step",
    "align packed": "one stream without padding, reference forward in each step",
    "align shared": "the same, and each prompt computed once for both completions",
    "align": "the same, and reference log-probs from the cache: **what align does by default**",
}


class Side(Protocol):
    """What a measurement needs of either framework."""

    policy: Any

    def loss(self, variant: str, pairs: Sequence[Example]) -> Tensor:
        """Mean DPO loss of the pairs, with a graph to the policy."""
        ...


class Align:
    """align's own parts: pack, Policy, DPO. No `reference` is needed when every pair is cached."""

    def __init__(self, policy: Any, reference: Any | None, cache: Cache | None = None):
        self.policy = policy
        self.reference = reference
        self.cache: Cache = cache if cache is not None else {}
        self.objective = plain_dpo(beta=BETA, loss=Sigmoid(0.0))

    def loss(self, variant: str, pairs: Sequence[Example]) -> Tensor:
        """Mean DPO loss of the pairs, as a training step computes it."""
        layout, cached = ALIGN_VARIANTS[variant]
        batch = pack(pairs, layout)
        if cached:
            reference = cached_stats(token_column([self.cache[p.source] for p in pairs], batch), batch)
        else:
            with torch.no_grad():
                reference = in_layout(self.reference, layout)(batch)
        losses = self.objective(in_layout(self.policy, layout)(batch), reference, batch)
        return torch.stack([t.weight * t.losses.sum() / len(pairs) for t in losses.terms]).sum()

    def cache_pass(self, pairs: Sequence[Example]) -> Cache:
        """Reference log-probs of all pairs by align's own cache, hashes and files included."""
        with tempfile.TemporaryDirectory() as root:
            cache = ReferenceCache(Path(root), "bench", torch.float32)
            forward = in_layout(self.reference, "shared")
            groups, names = [p.rows for p in pairs], [p.source for p in pairs]
            cache.fill(groups, names, forward, "shared", CACHE_TOKENS, forward.device, lambda steps, _: steps)
            return {p.source: np.concatenate(cache(p.rows)) for p in pairs}


def in_layout(model: Any, layout: Layout) -> Policy:
    """A Policy around a model that another layout may have used before; costs nothing."""
    model.config._attn_implementation = own_attention_name(model)
    return Policy(model, layout)


class Trl:
    """TRL's DPOTrainer: its collator and its compute_loss. No `reference`: precomputed values."""

    def __init__(self, policy: Any, reference: Any | None, cache: Cache | None = None):
        self.policy = policy
        self.cache: Cache = cache if cache is not None else {}
        self.trainer = _dpo_trainer(policy, reference)
        self.reference = reference

    def loss(self, variant: str, pairs: Sequence[Example]) -> Tensor:
        """Mean DPO loss of the pairs by TRL."""
        recompute, best = variant == "trl default", variant == "trl best"
        score_completions_only(best)
        if recompute:
            self.policy.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}  # TRL's default
            )
        else:
            self.policy.gradient_checkpointing_disable()
        self.trainer.precompute_ref_logps = best
        inputs = self.trainer.data_collator([self._example(pair, cached=best) for pair in pairs])
        return self.trainer.compute_loss(self.policy, inputs)

    @torch.no_grad()
    def cache_pass(self, pairs: Sequence[Example], batch_size: int) -> None:
        """TRL's own precompute: batches in the order of the data."""
        score_completions_only(True)
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            inputs = self.trainer.data_collator([self._example(p, cached=False) for p in part])
            self.trainer.compute_ref_log_probs(self.reference, inputs)

    def _example(self, pair: Example, cached: bool) -> dict[str, Any]:
        prompt = int(np.flatnonzero(pair.rows[0].targets)[0])
        example: dict[str, Any] = {
            "prompt_ids": pair.rows[0].token_ids[:prompt].tolist(),
            "chosen_ids": pair.rows[0].token_ids[prompt:].tolist(),
            "rejected_ids": pair.rows[1].token_ids[prompt:].tolist(),
        }
        if cached:
            values = self.cache[pair.source]
            chosen, rejected = np.split(values, [int(pair.rows[0].targets.sum())])
            example["ref_chosen_logps"] = float(chosen.sum())
            example["ref_rejected_logps"] = float(rejected.sum())
        return example


def score_completions_only(on: bool) -> None:
    """Whether TRL's head skips prompt and padding positions on a CPU as it does on a GPU.

    `add_fused_lm_head` asks `_use_triton(device)` which positions to score; the kernels ask a
    function of the same name in their own module, which stays as it is. So this changes which
    positions, not how.
    """
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils as utils

    utils._use_triton = (lambda device: True) if on else kernels._use_triton


def _dpo_trainer(policy: Any, reference: Any | None) -> Any:
    """A DPOTrainer around the models. Its data is a stand-in: batches come from its collator."""
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:  # the trainer makes its directory, writes nothing
        config = DPOConfig(
            output_dir=scratch,
            beta=BETA,
            max_length=4096,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            max_steps=1,
            dataloader_pin_memory=False,
            precompute_ref_log_probs=reference is None,
        )
        stand_in = datasets.Dataset.from_list([{"prompt": "a ", "chosen": "a", "rejected": "a a"}])
        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=stand_in,
            processing_class=stand_in_tokenizer(),
        )
    policy.train()
    return trainer


def stand_in_tokenizer() -> Any:
    """The least tokenizer DPOTrainer accepts; it sees only the stand-in."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": EOS}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
