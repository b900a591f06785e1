"""The chunked head against the definition on full logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.models.logprobs import Head, full_kl, stats, token_stats
from tests.objectives.build import batch_of


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


def leaves_of(head: Head, hidden, frozen):
    leaves = [hidden] if frozen else [x for x in (hidden, head.weight, head.bias) if x is not None]
    return [x.requires_grad_() for x in leaves]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_entropy_bonus_carries_its_gradient(frozen, softcap, scale, bias, chunk):
    hidden, weight, b, ids = problem(bias=bias)
    head = Head(weight, b, scale, softcap)
    leaves = leaves_of(head, hidden, frozen)
    expected = definition(hidden, head, ids)
    logp, top, bonus = token_stats(hidden, head, ids, ("log_max", "entropy_bonus"), chunk)
    torch.testing.assert_close(bonus, expected[3], rtol=1e-12, atol=1e-12)
    assert not top.requires_grad
    g, k = torch.linspace(-1, 1, 37, dtype=torch.float64), torch.linspace(2, -1, 37, dtype=torch.float64)
    # both, and each alone: the first backward uses the kept chunk up
    for actual, truth in (
        (logp @ g + bonus @ k, expected[0] @ g + expected[3] @ k),
        (logp @ g, expected[0] @ g),
        (bonus @ k, expected[3] @ k),
    ):
        gradients = torch.autograd.grad(actual, leaves, retain_graph=True)
        truths = torch.autograd.grad(truth, leaves, retain_graph=True)
        torch.testing.assert_close(gradients, truths, rtol=1e-11, atol=1e-12)


def test_entropy_bonus_by_finite_differences():
    hidden, weight, b, ids = problem(bias=True)
    inputs = [x[:4].clone().requires_grad_() for x in (hidden, weight, b)]

    def bonus(h, w, c):
        return token_stats(h, Head(w, c, 0.5, 4.0), ids[:4] % 4, ("entropy_bonus",), 3)[1]

    assert torch.autograd.gradcheck(bonus, inputs)


def test_entropy_of_one_certain_token_has_no_gradient():
    # p is 1 and 0: log 0 must not meet it
    hidden = torch.ones(1, 1, requires_grad=True)
    _, bonus = token_stats(hidden, Head(torch.tensor([[800.0], [0.0]])), torch.tensor([0]), ("entropy_bonus",))
    bonus.sum().backward()
    assert bonus.tolist() == [0.0]
    assert hidden.grad.tolist() == [[0.0]]


@pytest.mark.parametrize("frozen", [False, True])
def test_entropy_bonus_under_autocast_is_of_the_rounded_products(frozen):
    hidden, weight, _, ids = problem(torch.float32)
    leaves = leaves_of(Head(weight), hidden, frozen)
    with torch.autocast("cpu", torch.bfloat16):
        _, bonus = token_stats(hidden, Head(weight), ids, ("entropy_bonus",), 10)
    logp = torch.log_softmax(torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16()).float(), 1)
    truth = -(logp.exp() * logp).sum(1)
    assert bonus.dtype == torch.float32
    torch.testing.assert_close(bonus, truth, rtol=1e-5, atol=1e-5)
    for a, e in zip(torch.autograd.grad(bonus.sum(), leaves), torch.autograd.grad(truth.sum(), leaves), strict=True):
        # both sides round sums of products to bfloat16, whose step is 2^-8
        assert (a - e).norm() < 2**-7 * e.norm()


def test_entropy_bonus_goes_through_stats():
    row = torch.zeros(5, dtype=torch.long)
    hidden, weight, _, ids = problem()
    batch = replace(batch_of(row, 1, 1), target_index=torch.arange(5), target_ids=ids[:5])
    hidden.requires_grad_()
    out = stats(hidden, Head(weight), batch, frozenset({"entropy", "entropy_bonus", "reference"}))
    assert torch.equal(out.entropy, out.entropy_bonus)
    assert out.entropy_bonus.requires_grad
    assert not out.entropy.requires_grad


def dense_kl(hidden, head, other_hidden, other):
    logp, logq = (full_logps(h, w) for h, w in ((hidden, head), (other_hidden, other)))
    return (logp.exp() * (logp - logq)).sum(1)


def full_logps(hidden, head):
    every = torch.arange(len(head.weight)).repeat(len(hidden), 1)
    return torch.stack([definition(hidden, head, ids)[0] for ids in every.T], 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_full_kl(frozen, softcap, chunk):
    hidden, weight, b, _ = problem(bias=True)
    head = Head(weight, b, 0.5, softcap)
    # the reference is of another size and without bias
    g = torch.Generator().manual_seed(1)
    other_hidden = torch.randn(37, 6, generator=g, dtype=torch.float64).requires_grad_()
    other = Head(torch.randn(50, 6, generator=g, dtype=torch.float64).requires_grad_(), None, 2.0, None)
    leaves = leaves_of(head, hidden, frozen)
    kl = full_kl(hidden, head, other_hidden, other, chunk)
    truth = dense_kl(hidden, head, other_hidden, other)
    torch.testing.assert_close(kl, truth, rtol=1e-11, atol=1e-12)
    up = torch.linspace(-1, 1, 37, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(kl @ up, leaves, retain_graph=True),
        torch.autograd.grad(truth @ up, leaves),
        rtol=1e-10,
        atol=1e-12,
    )
    assert torch.autograd.grad(kl @ up, [other_hidden, other.weight], allow_unused=True) == (None, None)


def test_full_kl_of_equal_networks_is_zero():
    hidden, weight, _, _ = problem(torch.float32)
    hidden.requires_grad_()
    kl = full_kl(hidden, Head(weight), hidden, Head(weight), 10)
    kl.sum().backward()
    assert kl.tolist() == [0.0] * 37
    assert hidden.grad.abs().max() == 0


def test_full_kl_under_autocast_is_of_the_rounded_products():
    hidden, weight, b, _ = problem(torch.float32, bias=True)
    other = Head(weight.roll(1, 0))
    head = Head(weight, b)
    with torch.autocast("cpu", torch.bfloat16):
        actual = full_kl(hidden, head, hidden, other, 10)
    low = hidden.bfloat16()
    z = torch.nn.functional.linear(low, weight.bfloat16(), b.bfloat16()).float()
    r = torch.nn.functional.linear(low, other.weight.bfloat16()).float()
    p = torch.log_softmax(z, 1)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, (p.exp() * (p - torch.log_softmax(r, 1))).sum(1), rtol=1e-5, atol=1e-5)


def test_full_kl_needs_one_vocabulary():
    hidden, weight, _, _ = problem()
    with pytest.raises(ValueError, match="50 and 49 tokens"):
        full_kl(hidden, Head(weight), hidden, Head(weight[:-1]))


@pytest.mark.parametrize("frozen", [False, True])
def test_entropy_bonus_and_full_kl_never_hold_more_than_a_chunk_of_logits(frozen):
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
    head = Head(torch.randn(vocabulary, 4, requires_grad=not frozen))
    with Largest() as largest:
        _, bonus = token_stats(hidden, head, torch.zeros(count, dtype=torch.long), ("entropy_bonus",), chunk)
        (bonus.sum() + full_kl(hidden, head, torch.randn(count, 4), head, chunk).sum()).backward()
    assert largest.numel == chunk * vocabulary
