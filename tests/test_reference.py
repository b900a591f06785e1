"""The reference cache: computed once, by what it depends on, the same numbers whatever interrupted it."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from align.models.policy import Policy, lora, weights_hash
from align.models.reference import CHUNK_ROWS, ReferenceCache, row_key
from align.packing import pack, token_column
from align.types import Row
from tests.conftest import tiny_model

CPU = torch.device("cpu")


def through(items, _total):
    return items


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny_model("llama", torch.float32), "shared")


def fill(root, pairs, policy, model="m", precision=torch.float32, max_tokens=300, progress=through):
    cache = ReferenceCache(root, model, precision)
    calls = []

    def forward(batch):
        calls.append(len(batch.sources))
        return policy(batch)

    groups, sources = [p.rows for p in pairs], [p.source for p in pairs]
    done = cache.fill(groups, sources, forward, policy.layout, max_tokens, CPU, progress)
    return cache, done, sum(calls)


def rows_of(pairs) -> list[Row]:
    return [row for p in pairs for row in p.rows]


def equal(a: ReferenceCache, b: ReferenceCache, pairs) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a(rows_of(pairs)), b(rows_of(pairs)), strict=True))


def test_values_are_the_direct_ones(tmp_path, make_pairs, policy):
    pairs = make_pairs(10)
    cache, done, _ = fill(tmp_path, pairs, policy)
    assert (done.found, done.computed) == (0, 10)
    for pair in pairs:
        values = np.concatenate(cache(pair.rows))
        with torch.no_grad():
            direct = policy(pack([pair], "packed")).token_logps
        torch.testing.assert_close(torch.from_numpy(values), direct, rtol=1e-5, atol=1e-5)
        assert values.dtype == np.float32
    batch = pack(pairs, "shared")
    batch = replace(batch, reference_token_logps=token_column(cache(rows_of(pairs)), batch))
    with torch.no_grad():
        torch.testing.assert_close(batch.reference_token_logps, policy(batch).token_logps, rtol=1e-5, atol=1e-5)


def test_second_fill_computes_nothing(tmp_path, make_pairs, policy):
    pairs = make_pairs(CHUNK_ROWS + 6)
    first, _, _ = fill(tmp_path, pairs, policy)
    again, done, calls = fill(tmp_path, pairs[::-1], policy, max_tokens=100)
    assert (done.found, done.computed, calls) == (len(pairs), 0, 0)
    assert equal(first, again, pairs)


def test_repeated_rows_count_once(tmp_path, make_pairs, policy):
    pairs = make_pairs(4)
    cache, done, _ = fill(tmp_path, pairs + pairs, policy)
    assert (done.found, done.computed) == (0, 4)
    assert len(cache(rows_of(pairs + pairs))) == 16


def test_added_rows_cost_the_new_ones(tmp_path, make_pairs, policy):
    pairs = make_pairs(2 * CHUNK_ROWS + 10)
    first, _, _ = fill(tmp_path, pairs[: 2 * CHUNK_ROWS], policy)
    more, done, calls = fill(tmp_path, pairs, policy)
    assert (done.found, done.computed, calls) == (2 * CHUNK_ROWS, 10, 10)
    assert equal(first, more, pairs[: 2 * CHUNK_ROWS])


@pytest.mark.parametrize("change", [{"model": "n"}, {"precision": torch.bfloat16}])
def test_other_weights_or_precision_have_another_address(tmp_path, make_pairs, policy, change):
    pairs = make_pairs(3)
    fill(tmp_path, pairs, policy)
    assert fill(tmp_path, pairs, policy, **change)[1].computed == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_hash_is_of_the_base_alone():
    same = [weights_hash(tiny_model("llama", torch.float32)) for _ in range(2)]
    assert same[0] == same[1]
    with_adapter = lora(
        tiny_model("llama", torch.float32), rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=0
    )
    assert weights_hash(with_adapter) == same[0]
    other = tiny_model("llama", torch.float32)
    with torch.no_grad():
        other.model.norm.weight[3] = torch.nextafter(other.model.norm.weight[3], torch.tensor(9.0))
    assert weights_hash(other) != same[0]
    assert weights_hash(tiny_model("llama", torch.float64)) != same[0]


def test_key_depends_on_ids_and_targets(make_pairs):
    row = make_pairs(1)[0].rows[0]
    ids, targets = row.token_ids.copy(), row.targets.copy()
    ids[-1] += 1
    targets[-1] = False
    longer = Row(np.append(row.token_ids, 0).astype(np.int32), np.append(row.targets, False))
    keys = {row_key(r) for r in (row, Row(ids, row.targets), Row(row.token_ids, targets), longer)}
    assert len(keys) == 4
    assert row_key(Row(row.token_ids.copy(), row.targets.copy(), np.ones(len(ids), np.float32))) == row_key(row)


def test_changed_targets_are_computed(tmp_path, make_pairs, policy):
    pair = make_pairs(1)[0]
    fill(tmp_path, [pair], policy)
    targets = pair.rows[0].targets.copy()
    targets[-1] = False
    changed = replace(pair, rows=(Row(pair.rows[0].token_ids, targets), pair.rows[1]))
    cache, done, _ = fill(tmp_path, [changed], policy)
    assert done.computed == 1
    assert len(cache(changed.rows)[0]) == targets.sum()


@pytest.mark.parametrize("how", ["empty", "half", "last byte", "header", "value", "first byte"])
def test_damaged_file_is_computed_again(tmp_path, make_pairs, policy, how):
    pairs = make_pairs(CHUNK_ROWS + 6)
    whole, _, _ = fill(tmp_path, pairs, policy)
    path = max(tmp_path.rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    if how in ("header", "value", "first byte"):
        content[{"header": 40, "value": -6, "first byte": 0}[how]] ^= 2
    else:
        content = content[: {"empty": 0, "half": len(content) // 2, "last byte": len(content) - 1}[how]]
    path.write_bytes(bytes(content))
    again, done, _ = fill(tmp_path, pairs, policy)
    assert (done.found, done.computed) == (6, CHUNK_ROWS)
    assert equal(whole, again, pairs)
    assert fill(tmp_path, pairs, policy)[1].computed == 0


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_killed_in_the_middle(tmp_path, make_pairs, policy, stop):
    pairs = make_pairs(3 * CHUNK_ROWS + 5)
    whole, _, _ = fill(tmp_path / "whole", pairs, policy)

    def dying(items, _total):
        for item in items:
            if item == stop:
                os.kill(os.getpid(), 9)
            yield item

    pid = os.fork()
    if pid == 0:
        try:
            fill(tmp_path / "killed", pairs, policy, progress=dying)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    cache, done, _ = fill(tmp_path / "killed", pairs, policy)
    assert (done.found, done.computed) == (stop * CHUNK_ROWS, len(pairs) - stop * CHUNK_ROWS)
    assert equal(whole, cache, pairs)


def test_killed_between_writing_and_renaming(tmp_path, make_pairs, policy):
    pairs = make_pairs(5)
    pid = os.fork()
    if pid == 0:
        try:
            os.replace = lambda *_: os.kill(os.getpid(), 9)
            fill(tmp_path, pairs, policy)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    cache, done, _ = fill(tmp_path, pairs, policy)
    assert done.computed == 5
    assert equal(cache, fill(tmp_path, pairs, policy)[0], pairs)


def files_of(root) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_ino, p.read_bytes()) for p in root.rglob("*.safetensors")}


def spoil(path, keep_stat: bool) -> None:
    """Other bytes in the middle of a file."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    if keep_stat:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_files_that_were_whole_and_hold_nothing_wanted_are_not_opened_again(tmp_path, make_pairs, policy):
    """Of 3 125 files, which 100 000 pairs make, each start read and digested all."""
    ours, others = make_pairs(4), make_pairs(4)
    fill(tmp_path, ours, policy)
    (own,) = tmp_path.rglob("*.safetensors")
    first, _, _ = fill(tmp_path, others, policy)
    fill(tmp_path, ours, policy)  # has seen both whole
    (other,) = set(tmp_path.rglob("*.safetensors")) - {own}
    spoil(other, keep_stat=True)
    assert fill(tmp_path, ours, policy)[1].computed == 0
    assert other.exists()
    os.utime(other)  # a change of it that can be told
    assert fill(tmp_path, ours, policy)[1].computed == 0
    assert not other.exists()
    again, done, _ = fill(tmp_path, others, policy)
    assert done.computed == 4
    assert equal(first, again, others)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"files": {"x": 1}, "blake2b": "0"}', None])
def test_without_a_whole_index_all_files_are_read(tmp_path, make_pairs, policy, content):
    pairs = make_pairs(3)
    fill(tmp_path, pairs, policy)
    first, _, _ = fill(tmp_path, pairs, policy)
    (index,) = tmp_path.rglob("index.json")
    if content is None:
        told = index.read_text()
        content = told.replace('.safetensors": [', '.safetensors": [1', 1).encode()  # a digit more of a size
    index.write_bytes(content)
    (file,) = tmp_path.rglob("*.safetensors")
    spoil(file, keep_stat=True)
    again, done, _ = fill(tmp_path, pairs, policy)
    assert done.computed == 3
    assert equal(first, again, pairs)
