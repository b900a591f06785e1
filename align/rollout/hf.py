"""Completions by transformers' generate: for laptops, tests and the samples of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.models import Policy, stock_attention


@dataclass(frozen=True)
class Completion:
    """What a network wrote; `finished` if it ended its turn within the limit."""

    token_ids: tuple[int, ...]  # the end of turn included
    finished: bool


def stop_ids(tokenizer: Any, lm: Any) -> list[int]:
    """Every token that ends a turn: the generation config's and the tokenizer's."""
    configured = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int | None,
    batch_size: int,
    progress: Callable[[Iterable[int], int], Iterable[int]],
) -> list[Completion]:
    """One completion per prompt, in order: greedy with seed None, else sampled at temperature 1.

    Prompts of like length are generated together, padded on the left. The global generators are left as they were.
    """
    lm = policy.causal_lm
    stops = stop_ids(tokenizer, lm)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out: list[Completion | None] = [None] * len(prompts)
    training = policy.training
    policy.eval()
    devices = [policy.device] if policy.device.type == "cuda" else []
    starts = range(0, len(order), batch_size)
    with torch.random.fork_rng(devices=devices), stock_attention(lm):
        if seed is not None:
            torch.manual_seed(seed)
        for number in progress(range(len(starts)), len(starts)):
            part = order[starts[number] : starts[number] + batch_size]
            width = max(len(prompts[i]) for i in part)
            ids = torch.full((len(part), width), pad)
            mask = torch.zeros_like(ids)
            for k, i in enumerate(part):
                ids[k, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[k, width - len(prompts[i]) :] = 1
            sampling = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0}
            written = policy.model.generate(
                input_ids=ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                pad_token_id=pad,
                top_k=0 if seed is not None else None,
                top_p=1.0 if seed is not None else None,
                use_cache=True,
                **sampling,
            )[:, width:]
            for k, i in enumerate(part):
                out[i] = _cut(written[k].tolist(), set(stops))
    policy.train(training)
    return [c for c in out if c is not None]


def _cut(ids: list[int], stops: set[int]) -> Completion:
    """A row of a batch up to its own first stop token; what follows is padding."""
    for n, token in enumerate(ids):
        if token in stops:
            return Completion(tuple(ids[: n + 1]), True)
    return Completion(tuple(ids), False)
