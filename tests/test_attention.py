"""The packed attention's plan and its refusals. The GPU kernel itself needs a GPU; its plan does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen

from align import packing
from align.models import attention
from align.models.attention import SegmentPlan, packed_attention
from align.packing import pack, pack_groups, to_device, varlen_plan, with_extras
from align.types import Example, PackedBatch, Prompt, Row
from tests.simulated_gpu import kernel

CPU = torch.device("cpu")
# a pair: chosen 0..5 whole, rejected 5..8 after a prefix of 2; then a row on its own
SEGMENTS = ((0, 5, 0, 0), (5, 8, 0, 2), (8, 10, 8, 8))


def pack_of(segments: tuple[tuple[int, int, int, int], ...]) -> PackedBatch:
    """A batch of one row whose stream has these segments."""
    tokens = segments[-1][1]
    row = Row(np.zeros(tokens, np.int32), np.arange(tokens) > 0)
    return replace(pack_groups([[row]], "packed", ["x"]), segments=segments)


def test_a_batch_crosses_in_one_buffer(monkeypatch):
    """What arrives is what left, whatever its type. Here it arrives on the host: the GPU's copy is a line of torch."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 90, (2, 12)).astype(np.int32)
    second = np.r_[ids[0][:5], ids[1]]
    weights = rng.random(17).astype(np.float32)
    rows = (Row(ids[0], np.arange(12) > 3), Row(second, np.arange(17) > 3, weights))
    batch = pack([Example(rows, "a:1", Prompt((), ""), numbers={"gap": 1.5}, label=True)], "shared")
    batch = with_extras(replace(batch, varlen=varlen_plan(batch.segments)), {"step_index": torch.tensor([4])})
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **keys: plain(*args, **keys))
    moved = packing._moved(batch, packing._staged(packing._tensors(batch), torch.device("cpu")))
    assert len({t.untyped_storage().data_ptr() for t in packing._tensors(moved)}) == 1
    for before, after in zip(packing._tensors(batch), packing._tensors(moved), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert torch.equal(before, after)
    assert moved.extras["step_index"].tolist() == [4]
    assert moved.varlen.longest == batch.varlen.longest
    assert moved.labels.tolist() == [True]


def test_mask_is_causal_from_the_lower_right_and_keeps_the_window():
    plan = SegmentPlan(SEGMENTS)
    # 3 queries stand at positions 2, 3, 4 of 5 keys
    assert plan.mask(3, 5, None, CPU).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert plan.mask(3, 5, 2, CPU).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_variable_length_plan_gathers_the_prefix_before_the_own_keys():
    plan = varlen_plan(SEGMENTS)
    assert plan.queries.tolist() == [0, 5, 8, 10]
    assert plan.keys.tolist() == [0, 5, 10, 12]
    assert plan.gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9]
    assert plan.prefixes.tolist() == [5, 6]
    assert plan.own.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert plan.longest == (5, 5)
    assert varlen_plan(((0, 5, 0, 0), (5, 7, 5, 5))).gather is None  # nothing shared: keys as they are


def test_variable_length_plan_computes_the_same_attention():
    # the kernel's definition, segment by segment from the plan, against the CPU path
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 10, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    expected, _ = packed_attention(torch.nn.Module(), q, k, v, segments=SegmentPlan(SEGMENTS))
    plan = varlen_plan(SEGMENTS)
    cu_q, gather, cu_k = plan.queries, plan.gather, plan.keys
    keys, values = (x[0].transpose(0, 1)[gather].repeat_interleave(2, dim=1) for x in (k, v))
    queries = q[0].transpose(0, 1)
    for s in range(3):
        a, b, c, d = cu_q[s], cu_q[s + 1], cu_k[s], cu_k[s + 1]
        scores = torch.einsum("qhd,khd->hqk", queries[a:b], keys[c:d]) / 8**0.5
        hidden = torch.arange(d - c)[None, :] > torch.arange(d - c - (b - a), d - c)[:, None]
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values[c:d])
        torch.testing.assert_close(expected[0, a:b], out, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_gathered_keys_is_that_of_indexing():
    plan = varlen_plan(SEGMENTS)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 2, 4, generator=g, dtype=torch.float32, requires_grad=True)
    above = torch.randn(12, 2, 4, generator=g)
    (own,) = torch.autograd.grad(attention._WithPrefixes.apply(x, plan), x, above)
    (expected,) = torch.autograd.grad(x[plan.gather], x, above)
    torch.testing.assert_close(own, expected)


def test_capped_scores_in_blocks_are_those_at_once(monkeypatch):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 10, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2)]
    found = []
    for size in (attention._SCORES_BYTES, 4 * 4 * 5 * 2):  # two queries of five keys at a time
        monkeypatch.setattr(attention, "_SCORES_BYTES", size)
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        segments = SegmentPlan(SEGMENTS)
        out, _ = packed_attention(torch.nn.Module(), q, k, v, segments=segments, softcap=2.0, sliding_window=3)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for at_once, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, at_once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("heads,widths", [((4, 4), (8, 8)), ((4, 2), (24, 16)), ((2, 2), (20, 12))])
def test_the_kernel_gets_what_it_takes(monkeypatch, old, heads, widths):
    """In torch 2.11 it has no word for shared keys; heads of two sizes, or of no multiple of 8, end in zeros."""
    told = []

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert list(kernel.faults(q, k, v, cu_q, cu_k, max_q, max_k)) == []
        return kernel.forward(q, k, v, cu_q, cu_k, scale, window_size)

    def attend_now(*args, enable_gqa=False, **keys):
        told.append(enable_gqa)
        return attend(*args, **keys)

    monkeypatch.setattr(varlen, "varlen_attn", attend if old else attend_now)
    attention._groups_by_keyword.cache_clear()
    g = torch.Generator().manual_seed(0)
    sizes = zip((heads[0], heads[1], heads[1]), (widths[0], widths[0], widths[1]), strict=True)
    q, k, v = (torch.randn(1, n, 10, width, generator=g).bfloat16() for n, width in sizes)
    for window in (None, 3):
        plan = SegmentPlan(SEGMENTS, varlen_plan(SEGMENTS))
        found, _ = packed_attention(torch.nn.Module(), q, k, v, segments=plan, sliding_window=window)
        high = [x.float() for x in (q, k, v)]
        own = SegmentPlan(SEGMENTS)
        expected, _ = packed_attention(torch.nn.Module(), *high, segments=own, sliding_window=window)
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)  # bfloat16 keeps 8 bits
    attention._groups_by_keyword.cache_clear()
    assert told == ([] if old else [heads[0] != heads[1]] * 2)


@pytest.mark.parametrize("keyword", ["s_aux", "position_bias", "indices"])
def test_a_keyword_it_would_ignore_is_refused(keyword):
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=rf"{keyword}.*trainer.layout=padded"):
        packed_attention(torch.nn.Module(), x, x, x, segments=SegmentPlan(((0, 2, 0, 0),)), **{keyword: x})


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 3, 200])
def test_variable_length_kernel_equals_the_cpu_path(width, window):
    g = torch.Generator().manual_seed(0)
    segments = (*SEGMENTS, (10, 310, 10, 10), (310, 500, 10, 130))
    inputs = [torch.randn(1, heads, 500, width, generator=g) for heads in (4, 2, 2)]
    plan = to_device(pack_of(segments), torch.device("cuda")).varlen
    found = []
    for varlen_of, there in ((None, lambda x: x), (plan, lambda x: x.bfloat16().cuda())):
        q, k, v = (there(x).detach().requires_grad_() for x in inputs)
        out, _ = packed_attention(
            torch.nn.Module(), q, k, v, segments=SegmentPlan(segments, varlen_of), sliding_window=window
        )
        found.append((out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual.float().cpu(), expected, rtol=3e-2, atol=3e-2)  # bfloat16 keeps 8 bits
