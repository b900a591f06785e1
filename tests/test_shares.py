"""Work divided among processes: every example once, every process as many calls, about as many tokens."""

from __future__ import annotations

import numpy as np
import pytest

from align.packing import micro_batches, num_tokens, shares
from align.types import Row


def row(length: int, branch: int = 0) -> Row:
    ids = np.arange(length, dtype=np.int32) + 1000 * branch * (np.arange(length) >= length // 2)
    return Row(ids, np.arange(length) > 2)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_processes_share_the_work_evenly(layout, size):
    rng = np.random.default_rng(size)
    lengths = rng.integers(5, 120, 200)
    groups = [(row(n), row(n + 1, 1)) for n in lengths]
    parts = micro_batches(groups, [""] * 200, layout, 600, size)
    own = [shares(parts, rank, size) for rank in range(size)]
    assert len({len(part) for part in own}) == 1
    assert sorted(i for part in own for indices, mine in part if mine for i in indices) == list(range(200))
    loads = [sum(num_tokens(groups[i], layout) for indices, mine in part if mine for i in indices) for part in own]
    if layout != "padded":
        assert all(mine for part in own for _, mine in part)
        assert max(loads) / np.mean(loads) <= 1.05
    repeated = [indices for part in own for indices, mine in part if not mine]
    assert all(indices in parts for indices in repeated)


def test_fewer_examples_than_processes():
    parts = micro_batches([(row(9), row(7, 1))], ["a"], "shared", 100, 4)
    assert [shares(parts, rank, 4) for rank in range(4)] == [[([0], True)], *[[([0], False)]] * 3]


def test_no_examples_are_no_work():
    assert [shares([], rank, 2) for rank in range(2)] == [[], []]


def spread_by_looking_at_all(cost: list[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """The rule of micro_batches for streams as it is said: each example, the longest first, into the first of the
    emptiest parts."""
    order = sorted(range(len(cost)), key=lambda i: (-cost[i], i))
    num_parts = -(-max(1, -(-sum(cost) // max_tokens)) // multiple) * multiple
    while True:
        loads, parts = [0] * num_parts, [[] for _ in range(num_parts)]
        for i in order:
            k = min(range(len(loads)), key=loads.__getitem__)
            if loads[k] + cost[i] > max_tokens:
                if multiple > 1:
                    break
                loads.append(0)
                parts.append([])
                k = len(loads) - 1
            loads[k] += cost[i]
            parts[k].append(i)
        else:
            return [sorted(part) for part in parts if part]
        num_parts += multiple


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_the_heap_makes_the_parts_of_the_rule(multiple):
    """Many equal lengths, so that parts are equally full again and again; budgets from one example to all of them."""
    rng = np.random.default_rng(multiple)
    for _ in range(60):
        lengths = rng.integers(3, int(rng.integers(5, 60)), int(rng.integers(1, 120))).tolist()
        budget = int(max(lengths) * rng.uniform(1, 6))
        groups = [(row(n),) for n in lengths]
        made = micro_batches(groups, [""] * len(groups), "packed", budget, multiple)
        assert made == spread_by_looking_at_all(lengths, budget, multiple)
