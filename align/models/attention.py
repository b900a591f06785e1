"""Attention over a packed stream, registered with transformers' attention interface as "align_packed".

A segment's queries attend to its prefix span and, causally, to themselves. The plan of segments travels
through the forward's keyword arguments: state kept outside would be gone when a recomputing backward asks
again. Scaled-dot-product attention per segment on the CPU; one variable-length kernel on a GPU.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "align_packed"

# Handed down by transformers to every attention function and without meaning for this one.
_IGNORED = {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal", "position_embeddings"}


@dataclass(frozen=True)
class SegmentPlan:
    """Who attends to whom, for all layers of one forward; masks and index tensors are made once."""

    segments: tuple[tuple[int, int, int, int], ...]  # [S] query span, prefix span
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

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor, int, int]:
        """cu_seq_q [S+1], gather index of keys or None if it is the identity, cu_seq_k [S+1], longest q, k."""
        if ("varlen", device) not in self.cache:
            self.cache["varlen", device] = varlen_plan(self.segments, device)
        return self.cache["varlen", device]


def varlen_plan(
    segments: tuple[tuple[int, int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor, int, int]:
    """The segments as a variable-length kernel wants them: keys of a segment are its prefix, then its own."""
    queries = [end - start for start, end, _, _ in segments]
    keys = [(b - a) + (end - start) for start, end, a, b in segments]
    gather = [torch.cat([torch.arange(a, b), torch.arange(s, e)]) for s, e, a, b in segments]
    identity = all(a == b for _, _, a, b in segments)
    cumulative = [
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        for lengths in (queries, keys)
    ]
    index = None if identity else torch.cat(gather).to(device)
    return cumulative[0], index, cumulative[1], max(queries), max(keys)


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
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, segments, scaling, sliding_window), None
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
    """Attention with scores c * tanh(score / c), Gemma 2 (arXiv 2408.00118, section 2), which SDPA lacks."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.softmax(wide, dim=-1).to(q.dtype) @ v


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """One variable-length kernel for all segments. Needs a GPU; only its plan is tested without one."""
    from torch.nn.attention.varlen import varlen_attn

    cu_q, gather, cu_k, max_q, max_k = plan.varlen(query.device)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, heads, head_dim]
    if gather is not None:
        k, v = k[gather], v[gather]
    # (left, right) counts keys besides the query's own; a window of w keys includes it
    window = (sliding_window - 1, 0) if sliding_window is not None else (-1, 0)
    out = varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k,
        scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)  # its log-sum-exp was not asked for
    return out.unsqueeze(0)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
