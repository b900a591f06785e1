"""Attention over a packed stream, registered with transformers' attention interface as "align_packed".

A segment's queries attend to its prefix span and, causally, to themselves. The plan of segments travels
through the forward's keyword arguments: state kept outside would be gone when a recomputing backward asks
again. Scaled-dot-product attention per segment on the CPU; one variable-length kernel on a GPU.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from align.jsons import Json
from align.types import VarlenPlan

NAME = "align_packed"

# Handed down by transformers to every attention function and without meaning for this one.
_IGNORED = {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal", "position_embeddings"}

# What the variable-length kernel takes of a head: at most so many numbers, and a multiple of these.
_WIDEST, _STEP = 256, 8
# Capped scores that exist at the same time.
_SCORES_BYTES = 64 << 20


@dataclass(frozen=True)
class SegmentPlan:
    """Who attends to whom, for all layers of one forward; masks and index tensors are made once."""

    segments: tuple[tuple[int, int, int, int], ...]  # [S] query span, prefix span
    varlen: VarlenPlan | None = None  # of the same segments, on a GPU
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
        """[num_queries, num_keys] bool, causal from the lower right, at most `window` keys back."""
        key = (num_queries, num_keys, window, device)
        if key not in self.cache:
            query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
            keys = torch.arange(num_keys, device=device)[None, :]
            keep = keys <= query
            if window is not None:
                keep &= query - keys < window
            self.cache[key] = keep
        return self.cache[key]

    def owners(self) -> list[int]:
        """[S] the segment in which a segment's prefix lies; segments are consecutive parts of the stream."""
        if "owners" not in self.cache:
            starts = [start for start, _, _, _ in self.segments]
            self.cache["owners"] = [bisect_right(starts, prefix) - 1 for _, _, prefix, _ in self.segments]
        return self.cache["owners"]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    segments: SegmentPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown: object,
) -> tuple[Tensor, None]:
    """Attention output [1, T, heads, head_dim] of query [1, heads, T, head_dim], key and value (fewer heads: GQA).

    Raises ValueError for a keyword this function would silently ignore: a model that needs it is to be run
    with trainer.layout=padded, on its own attention.
    """
    meant = sorted(k for k, v in unknown.items() if v is not None and k not in _IGNORED)
    if meant or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} passes {meant or ['attention_mask']} to its attention, which the packed layouts "
            "do not honour; use trainer.layout=padded"
        )
    if dropout:
        raise ValueError("attention dropout is not supported in packed layouts; use trainer.layout=padded")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if segments.varlen is not None and softcap is None and _kernel_takes(query, value):
        return _varlen(query, key, value, segments.varlen, scaling, sliding_window), None
    grouped = query.shape[1] != key.shape[1]
    # Split, not sliced: the backward of a slice fills a tensor as large as the whole stream, for every segment.
    lengths = [end - start for start, end, _, _ in segments.segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for (_, _, prefix_start, prefix_end), owner, q, k, v in zip(
        segments.segments, segments.owners(), queries, keys, values, strict=True
    ):
        if prefix_end > prefix_start:
            first = prefix_start - segments.segments[owner][0]
            last = first + prefix_end - prefix_start
            k = torch.cat([keys[owner][:, :, first:last], k], dim=2)
            v = torch.cat([values[owner][:, :, first:last], v], dim=2)
        window = sliding_window if sliding_window is not None and sliding_window < k.shape[2] else None
        plain = q.shape[2] == k.shape[2] and window is None
        mask = None if plain else segments.mask(q.shape[2], k.shape[2], window, q.device)
        if softcap is None:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=plain, scale=scaling, enable_gqa=grouped
            )
        else:
            if mask is None:
                mask = segments.mask(q.shape[2], k.shape[2], None, q.device)
            out = _softcapped(q, k, v, mask, scaling, softcap)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    """Attention with scores c * tanh(score / c), Gemma 2 (arXiv 2408.00118, section 2), which SDPA lacks.

    Scores of many queries are made in blocks, and again in the backward: memory is linear in the length.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    block = max(1, _SCORES_BYTES // (4 * q.shape[1] * k.shape[2]))
    if block >= q.shape[2]:
        return _capped_block(q, k, v, mask, scale, softcap)
    parts = []
    for start in range(0, q.shape[2], block):
        rows = slice(start, start + block)
        seen = k.shape[2] - q.shape[2] + min(start + block, q.shape[2])  # causal: keys after these are masked
        inputs = (q[:, :, rows], k[:, :, :seen], v[:, :, :seen], mask[rows, :seen], scale, softcap)
        parts.append(checkpoint(_capped_block, *inputs, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts, dim=2)


def _capped_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    scores = q @ k.transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.softmax(wide, dim=-1).to(q.dtype) @ v


def _kernel_takes(query: Tensor, value: Tensor) -> bool:
    return query.dtype in (torch.bfloat16, torch.float16) and max(query.shape[-1], value.shape[-1]) <= _WIDEST


@cache
def _groups_by_keyword() -> Json:
    """What tells the kernel that heads share keys: it knows by itself before torch 2.12, and takes a keyword since."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: VarlenPlan,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """One variable-length kernel for all segments.

    It takes one size of head for queries, keys and values: narrower ones end in zeros, which change no score and are
    cut off the output.
    """
    from torch.nn.attention.varlen import varlen_attn

    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    width = -(-max(query.shape[-1], value.shape[-1]) // _STEP) * _STEP
    # [T, heads, width]; squeezed, not selected: the backward of a selection fills a tensor of zeros
    q, k, v = (_widened(x, width).squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    if plan.gather is not None:
        k, v = _WithPrefixes.apply(k, plan), _WithPrefixes.apply(v, plan)
    # (left, right) counts keys besides the query's own; a window of w keys includes it
    window = (sliding_window - 1, 0) if sliding_window is not None else (-1, 0)
    more: Json = _groups_by_keyword() if q.shape[1] != k.shape[1] else {}
    out = varlen_attn(q, k, v, plan.queries, plan.keys, *plan.longest, scale=scale, window_size=window, **more)
    assert isinstance(out, torch.Tensor)  # its log-sum-exp was not asked for
    return out[..., : value.shape[-1]].unsqueeze(0)


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class _WithPrefixes(torch.autograd.Function):
    """Keys [T, ...] of the stream as those of its segments [K, ...]: x[gather].

    The gradient is a copy for each token's own key and an addition of the prefixes', where the backward of indexing
    would sort all of them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, plan: VarlenPlan) -> Tensor:
        assert plan.gather is not None
        ctx.plan = plan
        return x.index_select(0, plan.gather)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gather, own, prefixes = ctx.plan.gather, ctx.plan.own, ctx.plan.prefixes
        out = grad.index_select(0, own).float()  # a prefix of many rows is a sum of many gradients
        out.index_add_(0, gather.index_select(0, prefixes), grad.index_select(0, prefixes).float())
        return out.to(grad.dtype), None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
