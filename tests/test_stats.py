"""The chunked head against the definition on full logits."""

from __future__ import annotations

import pytest
import torch

from align.stats import Head, token_stats


def problem(dtype=torch.float64, bias=False):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=g, dtype=dtype)
    weight = torch.randn(50, 16, generator=g, dtype=dtype)
    b = torch.randn(50, generator=g, dtype=dtype) if bias else None
    return hidden, weight, b, torch.randint(0, 50, (37,), generator=g)


def definition(hidden, head: Head, ids):
    z = hidden @ head.weight.t()
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    return (
        logp.gather(1, ids[:, None])[:, 0],
        p.square().sum(1).log(),
        logp.amax(1),
        -(p * logp).sum(1),
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
def test_values_and_gradients(frozen, softcap, scale, bias, chunk):
    hidden, weight, b, ids = problem(bias=bias)
    leaves = [hidden] if frozen else [x for x in (hidden, weight, b) if x is not None]
    for x in leaves:
        x.requires_grad_()
    head = Head(weight, b, scale, softcap)
    expected = definition(hidden, head, ids)
    g = torch.linspace(-1, 1, 37, dtype=torch.float64)
    truth = torch.autograd.grad(expected[0] @ g, leaves)
    actual = token_stats(hidden, head, ids, ("log_collision", "log_max", "entropy"), chunk)
    gradients = torch.autograd.grad(actual[0] @ g, leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), e.detach(), rtol=1e-12, atol=1e-12)
    for a, e in zip(gradients, truth, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    assert not any(extra.requires_grad for extra in actual[1:])


def test_huge_logits_neither_overflow_nor_vanish():
    # a gap of 800: exp(800) overflows float32 and float64's exp(-800) is 0; log p must still be -800
    weight = torch.tensor([[800.0], [0.0]])
    logp, collision, top, entropy = token_stats(
        torch.ones(2, 1), Head(weight), torch.tensor([0, 1]), ("log_collision", "log_max", "entropy")
    )
    assert logp.tolist() == [0.0, -800.0]
    assert [x.tolist() for x in (collision, top, entropy)] == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_of_more_than_one_chunk_never_exist(frozen):
    # tracks every tensor the head allocates: the largest may hold chunk x V numbers, not C x V
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    vocabulary, count, chunk = 1000, 64, 8
    hidden = torch.randn(count, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=not frozen)
    with Largest() as largest:
        values = token_stats(hidden, Head(weight), torch.zeros(count, dtype=torch.long), ("entropy",), chunk)
        values[0].sum().backward()
    assert largest.numel == chunk * vocabulary


def test_bfloat16_inputs_are_normalised_in_float32():
    hidden, weight, _, ids = problem(torch.float32)
    low = [x.bfloat16() for x in (hidden, weight)]
    z = torch.nn.functional.linear(*low).float()
    expected = torch.log_softmax(z, -1).gather(1, ids[:, None])[:, 0]
    (actual,) = token_stats(low[0], Head(low[1]), ids)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_no_targets_give_empty_stats():
    (logp,) = token_stats(torch.zeros(0, 3), Head(torch.zeros(5, 3)), torch.zeros(0, dtype=torch.long))
    assert logp.shape == (0,)


def test_a_second_backward_through_the_same_graph_gives_the_same_gradient():
    # the kept chunk is used up by the first one
    hidden, weight, _, ids = problem()
    weight.requires_grad_()
    (logp,) = token_stats(hidden, Head(weight), ids, chunk=10)
    first = torch.autograd.grad(logp.sum(), weight, retain_graph=True)[0]
    second = torch.autograd.grad(logp.sum(), weight)[0]
    torch.testing.assert_close(first, second, rtol=1e-14, atol=1e-14)
