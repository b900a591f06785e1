"""The packed attention's plan and its refusals. The GPU kernel itself needs a GPU; its plan does not."""

from __future__ import annotations

import pytest
import torch

from align.models.attention import SegmentPlan, packed_attention, varlen_plan

CPU = torch.device("cpu")
# a pair: chosen 0..5 whole, rejected 5..8 after a prefix of 2; then a row on its own
SEGMENTS = ((0, 5, 0, 0), (5, 8, 0, 2), (8, 10, 8, 8))


def test_mask_is_causal_from_the_lower_right_and_keeps_the_window():
    plan = SegmentPlan(SEGMENTS)
    # 3 queries stand at positions 2, 3, 4 of 5 keys
    assert plan.mask(3, 5, None, CPU).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert plan.mask(3, 5, 2, CPU).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_variable_length_plan_gathers_the_prefix_before_the_own_keys():
    cu_q, gather, cu_k, max_q, max_k = varlen_plan(SEGMENTS, CPU)
    assert cu_q.tolist() == [0, 5, 8, 10]
    assert cu_k.tolist() == [0, 5, 10, 12]
    assert gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9]
    assert (max_q, max_k) == (5, 5)
    assert varlen_plan(((0, 5, 0, 0), (5, 7, 5, 5)), CPU)[1] is None  # nothing shared: keys as they are


def test_variable_length_plan_computes_the_same_attention():
    # the kernel's definition, segment by segment from the plan, against the CPU path
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 10, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    expected, _ = packed_attention(torch.nn.Module(), q, k, v, segments=SegmentPlan(SEGMENTS))
    cu_q, gather, cu_k, _, _ = varlen_plan(SEGMENTS, CPU)
    keys, values = (x[0].transpose(0, 1)[gather].repeat_interleave(2, dim=1) for x in (k, v))
    queries = q[0].transpose(0, 1)
    for s in range(3):
        a, b, c, d = cu_q[s], cu_q[s + 1], cu_k[s], cu_k[s + 1]
        scores = torch.einsum("qhd,khd->hqk", queries[a:b], keys[c:d]) / 8**0.5
        hidden = torch.arange(d - c)[None, :] > torch.arange(d - c - (b - a), d - c)[:, None]
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values[c:d])
        torch.testing.assert_close(expected[0, a:b], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keyword", ["s_aux", "position_bias", "indices"])
def test_a_keyword_it_would_ignore_is_refused(keyword):
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=rf"{keyword}.*trainer.layout=padded"):
        packed_attention(torch.nn.Module(), x, x, x, segments=SegmentPlan(((0, 2, 0, 0),)), **{keyword: x})


@pytest.mark.gpu
def test_variable_length_kernel_equals_the_cpu_path():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 10, 64, generator=g) for heads in (4, 2, 2))
    for window in (None, 3):
        expected, _ = packed_attention(
            torch.nn.Module(), q, k, v, segments=SegmentPlan(SEGMENTS), sliding_window=window
        )
        low = [x.bfloat16().cuda() for x in (q, k, v)]
        actual, _ = packed_attention(torch.nn.Module(), *low, segments=SegmentPlan(SEGMENTS), sliding_window=window)
        # bfloat16 keeps 8 bits
        torch.testing.assert_close(actual.float().cpu(), expected, rtol=2e-2, atol=2e-2)
