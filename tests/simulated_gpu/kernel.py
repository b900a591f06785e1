"""torch's variable-length attention kernel, plainly computed, and what the real one asks of its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def faults(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Iterator[str]:
    """What a flash kernel refuses or misreads."""
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        yield f"types {q.dtype}, {k.dtype}, {v.dtype}"
    if {cu_q.dtype, cu_k.dtype} != {torch.int32}:
        yield f"cumulative lengths of type {cu_q.dtype}, {cu_k.dtype}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        yield f"heads of {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        yield f"heads of {q.shape[-1]}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        yield "a last dimension that is not contiguous"
    for name, cumulative, tokens, longest in (("queries", cu_q, q, max_q), ("keys", cu_k, k, max_k)):
        lengths = cumulative.diff()
        if int(cumulative[-1]) != len(tokens) or int(lengths.max()) != longest or int(lengths.min()) < 1:
            yield f"lengths of {name} that do not fit: {cumulative.tolist()}, longest {longest}, {len(tokens)} tokens"


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """Output [T, heads, head_dim]; softmax in float32."""
    parts = [s.probabilities @ s.values for s in _segments(q, k, v, cu_q, cu_k, scale, window)]
    return torch.cat([part.transpose(0, 1) for part in parts]).to(q.dtype)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, window: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k, v; written out, as this runs below autograd."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for s in _segments(q, k, v, cu_q, cu_k, scale, window):
        above = grad[s.rows].float().transpose(0, 1)
        p = s.probabilities
        of_p = above @ s.values.transpose(1, 2)
        of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True)) * scale
        shared = [_folded(x, k.shape[1]) for x in (of_scores.transpose(1, 2) @ s.queries, p.transpose(1, 2) @ above)]
        found.append(((of_scores @ s.keys).transpose(0, 1), *shared))
    of_q, of_k, of_v = (torch.cat(parts).to(q.dtype) for parts in zip(*found, strict=True))
    return of_q, of_k, of_v


def _folded(x: Tensor, heads: int) -> Tensor:
    """[query heads, keys, d] to [keys, heads, d]: heads that share keys add up."""
    return x.view(heads, -1, *x.shape[1:]).sum(1).transpose(0, 1)


@dataclass(frozen=True)
class _Segment:
    """[heads, ., .] in float32."""

    rows: slice
    queries: Tensor
    keys: Tensor
    values: Tensor
    probabilities: Tensor


def _segments(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, window: tuple[int, int]
) -> Iterator[_Segment]:
    repeats = q.shape[1] // k.shape[1]
    left, right = window
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        queries = q[a:b].float().transpose(0, 1)
        keys, values = (x[c:d].float().transpose(0, 1).repeat_interleave(repeats, 0) for x in (k, v))
        at = torch.arange(d - c - (b - a), d - c)[:, None]  # the last query stands at the last key
        far = torch.arange(d - c)[None] - at
        hidden = far > right if right >= 0 else torch.zeros_like(far, dtype=torch.bool)
        if left >= 0:
            hidden = hidden | (far < -left)
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        yield _Segment(slice(a, b), queries, keys, values, scores.softmax(-1))
