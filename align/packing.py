"""Rows to PackedBatch: one stream of tokens, prefixes shared, micro-batches by token budget.

Knows nothing of models, text or losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from heapq import heappush, heapreplace

import numpy as np

from align.deferred import torch
from align.types import Example, Extras, Layout, PackedBatch, Row, VarlenPlan


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two rows [L] have in common."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def num_tokens(rows: Sequence[Row], layout: Layout) -> int:
    """Tokens of the stream that the rows of an example cost; padding is not counted, see micro_batches."""
    total = sum(len(row.token_ids) for row in rows)
    if layout == "shared":
        total -= sum(common_prefix_length(rows[0].token_ids, row.token_ids) for row in rows[1:])
    return total


def micro_batches(
    groups: Sequence[Sequence[Row]], sources: Sequence[str], layout: Layout, max_tokens: int, multiple: int = 1
) -> list[list[int]]:
    """Indices into `groups` (the rows of each example), split so that no part costs more than `max_tokens` tokens.

    Longest first into the part with most room that still takes it: nearly full, nearly equal parts, and the
    same answer for the same examples. In the padded layout a row costs the longest row of its part, so rows of
    like length are put together. multiple: of how many parts there should be, where there are examples enough.
    Raises ValueError, naming the line, when one example alone is over the budget.
    """
    costs = [_within(rows, source, layout, max_tokens) for rows, source in zip(groups, sources, strict=True)]
    order = sorted(range(len(groups)), key=lambda i: (-costs[i], i))
    if layout == "padded":
        return _alike(order, costs, max_tokens, multiple)
    num_parts = _rounded(max(1, -(-sum(costs) // max_tokens)), multiple)
    while True:
        parts = _spread(order, costs, max_tokens, num_parts, grow=multiple == 1)
        if parts is not None:
            return [sorted(p) for p in parts if p]
        num_parts += multiple


def cost(rows: Sequence[Row], layout: Layout) -> int:
    """Tokens that an example costs alone in a micro-batch."""
    return len(rows) * max(len(row.token_ids) for row in rows) if layout == "padded" else num_tokens(rows, layout)


def _within(rows: Sequence[Row], source: str, layout: Layout, max_tokens: int) -> int:
    """What an example costs. Raises ValueError, naming the line, if it alone is over the budget of a micro-batch."""
    tokens = cost(rows, layout)
    if tokens > max_tokens:
        raise ValueError(
            f"{source}: the example has {tokens} tokens, trainer.micro_batch_tokens={max_tokens}; "
            f"use at least {tokens}, or a smaller data.max_tokens"
        )
    return tokens


def check_budget(groups: Iterable[Sequence[Row]], sources: Iterable[str], layout: Layout, max_tokens: int) -> None:
    """Raises ValueError, naming the line, for the first example that alone is over the budget of a micro-batch."""
    for rows, source in zip(groups, sources, strict=True):
        _within(rows, source, layout, max_tokens)


def _spread(
    order: Sequence[int], costs: Sequence[int], max_tokens: int, num_parts: int, grow: bool
) -> list[list[int]] | None:
    """Each example into the part with most room, the first of these; where it does not fit, into a new one if they may
    `grow`, else None. A heap: the emptiest part of thousands is found without a look at the others."""
    room = [(0, k) for k in range(num_parts)]  # in order, so that it is a heap
    parts: list[list[int]] = [[] for _ in room]
    for i in order:
        load, k = room[0]
        if load + costs[i] <= max_tokens:
            heapreplace(room, (load + costs[i], k))
        elif not grow:
            return None
        else:
            k = len(parts)
            parts.append([])
            heappush(room, (costs[i], k))
        parts[k].append(i)
    return parts


def _alike(order: Sequence[int], costs: Sequence[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """Examples in this order, each part's as long as its first; with smaller parts where it takes more of them."""
    limit = max_tokens
    while True:
        parts: list[list[int]] = []
        width = 0
        for i in order:
            if parts and width * (len(parts[-1]) + 1) <= limit:
                parts[-1].append(i)
            else:
                width = costs[i]
                parts.append([i])
        if len(parts) % multiple == 0 or len(parts) == len(order):
            return [sorted(p) for p in parts]
        limit = max(limit * 3 // 4, 1)


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def shares(parts: Sequence[list[int]], rank: int, size: int) -> list[tuple[list[int], bool]]:
    """The parts of process `rank` of `size`, as many as every other process has, and whether each is its own.

    What is not repeats a part of another, to be forwarded and backwarded with weight 0: sharded engines hang when
    processes differ in the number of calls.
    """
    own = [(part, True) for part in parts[rank::size]]
    missing = -(-len(parts) // size) - len(own)
    return own + [(min(parts, key=len), False)] * missing if missing else own


def pack(examples: Sequence[Example], layout: Layout) -> PackedBatch:
    """One batch of P examples with R rows each, one example's after the other's.

    Raises ValueError for a sequence without tokens or whose first token is a target (nothing predicts it).
    """
    batch = pack_groups([e.rows for e in examples], layout, [e.source for e in examples])
    labels = [e.label for e in examples]
    names = sorted({name for e in examples for name in e.numbers})
    return replace(
        batch,
        origins=tuple(e.origin for e in examples),
        labels=None if None in labels else torch.tensor(labels, dtype=torch.bool),
        # a column that an example lacks is NaN there: no objective may take it for a number
        numbers={name: torch.tensor([e.numbers.get(name, math.nan) for e in examples]) for name in names},
    )


def pack_groups(groups: Sequence[Sequence[Row]], layout: Layout, sources: Sequence[str]) -> PackedBatch:
    """One batch of N rows in groups that begin alike (the completions of a prompt).

    `groups` of the batch is [P, R] with R the largest number of rows; a smaller group ends in -1.
    """
    rows = [row for group in groups for row in group]
    for group, source in zip(groups, sources, strict=True):
        if any(len(row.token_ids) == 0 or row.targets[0] for row in group):
            raise ValueError(f"{source}: a sequence needs a first token that is no target")
    if layout == "padded":
        input_ids, position_ids, segments, where, padded_shape = _padded(rows)
    else:
        start = 0
        owner = []  # the row whose beginning a row may share; its own if it is the first of its group
        for group in groups:
            owner += [start] * len(group)
            start += len(group)
        input_ids, position_ids, segments, where = _stream(rows, owner, share=layout == "shared")
        padded_shape = None

    positions = [np.flatnonzero(row.targets) for row in rows]
    lengths = torch.tensor([len(p) for p in positions], dtype=torch.long)
    weights = None
    if any(row.weights is not None for row in rows):
        parts = [
            np.ones(len(p), np.float32) if row.weights is None else row.weights[p].astype(np.float32)
            for row, p in zip(rows, positions, strict=True)
        ]
        weights = torch.from_numpy(np.concatenate(parts))
        lengths = torch.tensor([float(part.sum(dtype=np.float64)) for part in parts])
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segments=tuple(segments),
        padded_shape=padded_shape,
        row_lengths=tuple(len(row.token_ids) for row in rows),
        # the hidden state before a token predicts it
        target_index=_long([where[n][p - 1] for n, p in enumerate(positions)]),
        target_ids=_long([rows[n].token_ids[p] for n, p in enumerate(positions)]),
        target_weights=weights,
        row=_long([np.full(len(p), n) for n, p in enumerate(positions)]),
        lengths=lengths,
        groups=_groups([len(group) for group in groups]),
        last_index=torch.tensor([int(w[-1]) for w in where], dtype=torch.long),
        sources=tuple(sources),
        origins=("",) * len(groups),
        columns=_columns(rows, positions, sources),
    )


def _groups(sizes: Sequence[int]) -> torch.Tensor:
    out = torch.full((len(sizes), max(sizes)), -1)
    first = 0
    for group, size in zip(out, sizes, strict=True):
        group[:size] = torch.arange(first, first + size)
        first += size
    return out


def _columns(rows: Sequence[Row], positions: Sequence[np.ndarray], sources: Sequence[str]) -> dict[str, torch.Tensor]:
    """The rows' columns one after the other. Raises ValueError if a row lacks one or its length is not the row's."""
    names = sorted({name for row in rows for name in row.columns})
    out = {}
    for name in names:
        parts = []
        for row, targets in zip(rows, positions, strict=True):
            if name not in row.columns or len(row.columns[name]) != len(targets):
                raise ValueError(f"{sources[0]}...: a row of the batch has no column {name} of {len(targets)} targets")
            parts.append(row.columns[name])
        out[name] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
    return out


def token_column(parts: Sequence[np.ndarray], batch: PackedBatch) -> torch.Tensor:
    """Values of the targets of each row as one column [C], float32. Raises ValueError if they do not fit."""
    values = torch.from_numpy(np.concatenate(parts).astype(np.float32))
    if len(values) != len(batch.row):
        raise ValueError("the cached log-probs do not fit the targets of these rows")
    return values


def with_extras(batch: PackedBatch, more: Mapping[str, torch.Tensor]) -> PackedBatch:
    """The batch with these extras beside its own."""
    return replace(batch, extras=Extras({**batch.extras, **more}))


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch with its tensors on `device`. On a GPU with the plan of its segments, all of it in one copy that nobody
    waits for."""
    if device.type != "cuda":
        return batch if device.type == "cpu" else _moved(batch, [t.to(device) for t in _tensors(batch)])
    if batch.segments:
        batch = replace(batch, varlen=varlen_plan(batch.segments))
    return _moved(batch, _staged(_tensors(batch), device))


def varlen_plan(segments: Sequence[tuple[int, int, int, int]]) -> VarlenPlan:
    """The segments, consecutive parts of a stream, for a variable-length kernel; on the host."""
    start, end, first, last = np.array(segments, np.int64).T
    queries, prefixes = end - start, last - first
    keys = queries + prefixes

    def cumulative(lengths: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))

    plan = VarlenPlan(cumulative(queries), cumulative(keys), (int(queries.max()), int(keys.max())))
    if not prefixes.any():
        return plan
    before = keys.cumsum() - keys
    own = _ranges(before + prefixes, queries)
    shared = _ranges(before, prefixes)
    gather = np.empty(int(keys.sum()), np.int64)
    gather[own], gather[shared] = _ranges(start, queries), _ranges(first, prefixes)
    return replace(
        plan, **{k: torch.from_numpy(v) for k, v in (("gather", gather), ("own", own), ("prefixes", shared))}
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each start, `length` of them, one after the other."""
    return np.repeat(starts - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())


# Of a part of the buffer, so that it may be read as any type.
_ALIGNED = 16


def _staged(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the host as views of one on a GPU: of one pinned buffer, by one copy."""
    sizes = [t.numel() * t.element_size() for t in tensors]
    starts = np.cumsum([0, *(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]).tolist()
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for t, start, size in zip(tensors, starts, sizes, strict=False):
        buffer[start : start + size].view(t.dtype).view(t.shape).copy_(t)
    there = buffer.to(device, non_blocking=True)
    return [
        there[start : start + size].view(t.dtype).view(t.shape)
        for t, start, size in zip(tensors, starts, sizes, strict=False)
    ]


def _parts_of(batch: PackedBatch) -> dict[str, Mapping[str, torch.Tensor]]:
    """Tensors of a batch by the field that holds them, those that stand by themselves below ""."""
    alone = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    plan = {} if batch.varlen is None else {k: v for k, v in vars(batch.varlen).items() if isinstance(v, torch.Tensor)}
    return {"": alone, "varlen": plan, "numbers": batch.numbers, "columns": batch.columns, "extras": batch.extras}


def _tensors(batch: PackedBatch) -> list[torch.Tensor]:
    return [value for part in _parts_of(batch).values() for value in part.values()]


def _moved(batch: PackedBatch, tensors: Sequence[torch.Tensor]) -> PackedBatch:
    """The batch with these in the place of its tensors, in the order of _tensors."""
    new = iter(tensors)
    parts = {field: {name: next(new) for name in part} for field, part in _parts_of(batch).items()}
    alone, varlen = parts.pop(""), parts.pop("varlen")
    plan = None if batch.varlen is None else replace(batch.varlen, **varlen)
    return replace(batch, **alone, **parts | {"extras": Extras(parts["extras"])}, varlen=plan)


def _long(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(_cat(parts))


def _cat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64)


_Segments = list[tuple[int, int, int, int]]


def _stream(
    rows: list[Row], owner: list[int], share: bool
) -> tuple[np.ndarray, np.ndarray, _Segments, list[np.ndarray]]:
    """Rows one after the other, without what they share with the first row of their group.

    -> input_ids [T], position_ids [T], segments, and for each row the stream positions of its tokens.
    """
    ids, positions = [], []
    segments: _Segments = []
    where: list[np.ndarray] = []
    end = 0
    for n, row in enumerate(rows):
        shared = 0
        if share and owner[n] != n:
            shared = common_prefix_length(rows[owner[n]].token_ids, row.token_ids)
        own = len(row.token_ids) - shared
        prefix = int(where[owner[n]][0]) if shared else end
        where.append(np.concatenate([np.arange(prefix, prefix + shared), np.arange(end, end + own)]))
        if own:
            segments.append((end, end + own, prefix, prefix + shared))
        ids.append(row.token_ids[shared:])
        positions.append(np.arange(shared, len(row.token_ids)))
        end += own
    return _cat(ids), _cat(positions), segments, where


def _padded(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, _Segments, list[np.ndarray], tuple[int, int]]:
    """Right-padded rows; what stands in the padding never meets a target, so any token id serves."""
    width = max(len(row.token_ids) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row.token_ids)] = row.token_ids
    positions = np.tile(np.arange(width), len(rows))
    where = [np.arange(len(row.token_ids)) + n * width for n, row in enumerate(rows)]
    return ids.reshape(-1), positions, [], where, (len(rows), width)
