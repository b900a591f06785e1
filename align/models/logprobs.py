"""Hidden states to log-probs: the only file that touches logits, and never more than one chunk of them.

Heads, scaling of logits and the chunked computation live here; which positions are scored is packing's, what
the numbers mean is the objectives'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align.jsons import Json
from align.sums import target_sums
from align.types import PackedBatch, Stats

# Logits that exist at the same time. On a CPU, with 49k and 10k vocabularies, chunks of 64 to 4096 tokens differ by
# 4 %, so the bound is one of memory; GPUs want larger matrix products.
CHUNK_BYTES_CPU = 48 << 20
CHUNK_GPU = 2048  # tokens

EXTRAS = ("log_collision", "log_max", "entropy", "entropy_bonus")


@dataclass(frozen=True)
class Head:
    """What turns a hidden state h [H] into logits [V]: softcap * tanh(scale * (W h + b) / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None


def stats(hidden: Tensor, head: Head, batch: PackedBatch, needs: frozenset[str] = frozenset()) -> Stats:
    """What the network thinks of the targets of a batch.

    hidden: [T, H], last hidden states of the stream, after the final norm.
    needs: which of log_collision, log_max, entropy, entropy_bonus to compute as well; other names are ignored here.
    """
    extras = tuple(name for name in EXTRAS if name in needs)
    values = token_stats(hidden.index_select(0, batch.target_index), head, batch.target_ids, extras)
    token_logps = values[0]
    optional: Json = dict(zip(extras, values[1:], strict=True))
    return Stats(
        token_logps=token_logps,
        logps=target_sums(token_logps, batch),
        lengths=batch.lengths,
        row=batch.row,
        **optional,
    )


def cached_stats(token_logps: Tensor, batch: PackedBatch) -> Stats:
    """Cached log-probs [C] of a batch as Stats."""
    return Stats(token_logps, target_sums(token_logps, batch), batch.lengths, batch.row)


def token_stats(
    hidden: Tensor, head: Head, target_ids: Tensor, extras: tuple[str, ...] = (), chunk: int | None = None
) -> tuple[Tensor, ...]:
    """log p(target) [C], then one [C] per name in `extras`, all in float32 (float64 for float64 input).

    hidden: [C, H]; target_ids: [C]. Only the log-probs and entropy_bonus carry a gradient, to hidden, weight and bias.
    """
    hidden, weight, bias = _operands(hidden, head)
    chunk = chunk or _chunk_size(hidden, weight)
    # the entropy's gradient depends on what comes from above, so nothing of it can be formed in the forward
    bonus = "entropy_bonus" in extras
    frozen = not (bonus or weight.requires_grad or (bias is not None and bias.requires_grad))
    function = _FrozenHead if frozen and hidden.requires_grad and torch.is_grad_enabled() else _ChunkedHead
    keep = torch.is_grad_enabled() and not hidden.is_cuda and head.softcap is None
    with torch.autocast(hidden.device.type, enabled=False):
        out = function.apply(hidden, weight, bias, target_ids, head.scale, head.softcap, extras, chunk, keep)
    return out if isinstance(out, tuple) else (out,)


def full_kl(
    hidden: Tensor, head: Head, reference_hidden: Tensor, reference_head: Head, chunk: int | None = None
) -> Tensor:
    """KL(policy || reference) [C] of the whole next-token distributions, nats, float32 (float64 for float64 input).

    hidden, reference_hidden: [C, H] and [C, H'], before the same targets. The gradient goes to hidden and to the
    policy's head; none to the reference.
    """
    hidden, weight, bias = _operands(hidden, head)
    other_hidden, other_weight, other_bias = _operands(reference_hidden.detach(), reference_head)
    other = Head(
        other_weight.detach(),
        None if other_bias is None else other_bias.detach(),
        reference_head.scale,
        reference_head.softcap,
    )
    if len(other.weight) != len(weight):
        raise ValueError(
            f"policy and reference have {len(weight)} and {len(other.weight)} tokens in their vocabularies"
        )
    chunk = chunk or max(1, _chunk_size(hidden, weight) // 2)  # the logits of two networks at the same time
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedKL.apply(hidden, weight, bias, other_hidden, other, head.scale, head.softcap, chunk)


def _operands(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias in the one type that their product runs in."""
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif weight.dtype != hidden.dtype:
        weight = weight.to(hidden.dtype)
    return hidden, weight, bias if bias is None else bias.to(weight.dtype)


def _chunk_size(hidden: Tensor, weight: Tensor) -> int:
    return CHUNK_GPU if hidden.is_cuda else max(64, CHUNK_BYTES_CPU // (4 * weight.shape[0]))


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits of one chunk in at least float32: sums of exp over 100k bfloat16 logits lose digits."""
    z = torch.nn.functional.linear(h, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    if scale != 1.0:
        z.mul_(scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _chain(grad: Tensor, z: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Gradient by the logits turned into one by W h + b, in place; z are the logits after scaling."""
    if softcap is not None:
        grad.mul_(1 - (z / softcap).square_())
    if scale != 1.0:
        grad.mul_(scale)
    return grad


def _normalise(z: Tensor, target_ids: Tensor, extras: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, list]:
    """z becomes exp(z - max), in place. -> log p(target), log sum exp z, sum exp(z - max), the extras."""
    target = z.gather(1, target_ids[:, None])[:, 0]
    top = z.amax(1)
    z.sub_(top[:, None]).exp_()
    total = z.sum(1)
    log_total = total.log()
    values = []
    for name in extras:
        if name == "log_collision":  # log sum p^2 = log sum x^2 - 2 log sum x
            values.append(2 * torch.linalg.vector_norm(z, dim=1).log() - 2 * log_total)
        elif name == "log_max":  # the largest x is exp(0)
            values.append(-log_total)
        else:  # entropy and its bonus: log sum x - sum x log x / sum x
            values.append(log_total + torch.special.entr(z).sum(1) / total)
    return target - top - log_total, top + log_total, total, values


class _ChunkedHead(torch.autograd.Function):
    """Logits live as one [chunk, V] buffer and are computed again in the backward.

    With `keep` the last chunk stays as probabilities until the backward, which begins with it: one product with
    the head fewer, 4 % of a step whose targets fit a chunk, and still one chunk at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, scale, softcap, extras, chunk, keep):
        logps, lses, rest = [], [], [[] for _ in extras]
        ctx.kept = None
        for h, y in zip(hidden.split(chunk), target_ids.split(chunk), strict=True):
            z = _logits(h, weight, bias, scale, softcap)
            logp, lse, total, values = _normalise(z, y, extras)
            logps.append(logp)
            lses.append(lse)
            ctx.kept = z.div_(total[:, None]) if keep and len(logps) * chunk >= len(hidden) else None
            del z  # before the next chunk is made
            for collected, value in zip(rest, values, strict=True):
                collected.append(value)
        outputs = (_join(logps, hidden), *(_join(r, hidden) for r in rest))
        bonus = extras.index("entropy_bonus") if "entropy_bonus" in extras else None
        entropy = None if bonus is None else outputs[1 + bonus]
        ctx.save_for_backward(hidden, weight, bias, target_ids, _join(lses, hidden), entropy)
        ctx.settings = (scale, softcap, chunk, bonus)
        ctx.mark_non_differentiable(*(x for x in outputs[1:] if x is not entropy))
        return outputs

    @staticmethod
    def backward(ctx, grad, *others):
        hidden, weight, bias, target_ids, lse, entropy = ctx.saved_tensors
        scale, softcap, chunk, bonus = ctx.settings
        grads = _Gradients(ctx, hidden, weight, bias)
        # used up: a second backward through the same graph computes it again
        kept, ctx.kept = ctx.kept, None
        for start in reversed(range(0, len(hidden), chunk)):
            part = slice(start, start + chunk)
            h, y, g = hidden[part], target_ids[part], grad[part]
            if kept is None:
                z = _logits(h, weight, bias, scale, softcap)
                raw = z.clone() if softcap is not None else z
                d = z.sub_(lse[part, None]).exp_()
            else:
                d = raw = kept
                kept = None
            if bonus is None:
                d.mul_(-g[:, None])  # -g p
            else:
                d = _entropy_chain(d, entropy[part, None], others[bonus][part, None]).addcmul_(d, g[:, None], value=-1)
            d.scatter_add_(1, y[:, None], g[:, None])  # + g at the target
            grads.add(part, _chain(d, raw, scale, softcap))
        return *grads.finished(), None, None, None, None, None, None


def _entropy_chain(p: Tensor, entropy: Tensor, grad: Tensor) -> Tensor:
    """Gradient of grad * H by the logits, -grad p (log p + H), of probabilities that may be 0."""
    return torch.special.entr(p).addcmul_(p, entropy, value=-1).mul_(grad)


class _Gradients:
    """What gradients by the logits, chunk after chunk, add up to for the hidden states and the head.

    The first three inputs of the function that `ctx` belongs to are hidden, weight and bias.
    """

    def __init__(self, ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.hidden, self.weight = hidden, weight
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # summed over chunks, hence in float32 even for bfloat16 weights
        self.of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        self.of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        self.of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None

    def add(self, part: slice, d: Tensor) -> None:
        """The share of the tokens of `part`; d: gradient by W h + b."""
        narrow = d.to(self.hidden.dtype)
        if self.of_hidden is not None:
            torch.mm(narrow, self.weight, out=self.of_hidden[part])
        if self.of_weight is not None:
            if self.of_weight.dtype == self.weight.dtype:
                self.of_weight.addmm_(narrow.t(), self.hidden[part])
            else:
                self.of_weight.add_(narrow.t() @ self.hidden[part])
        if self.of_bias is not None:
            self.of_bias.add_(d.sum(0))

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, None where none is asked for."""
        dtype = self.weight.dtype
        return (
            self.of_hidden,
            None if self.of_weight is None else self.of_weight.to(dtype),
            None if self.of_bias is None else self.of_bias.to(dtype),
        )


class _ChunkedKL(torch.autograd.Function):
    """KL of two softmaxes; the logits of both live as one chunk each and are computed again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, other_hidden, other, scale, softcap, chunk):
        out = []
        for h, k in zip(hidden.split(chunk), other_hidden.split(chunk), strict=True):
            logp = torch.log_softmax(_logits(h, weight, bias, scale, softcap), 1)
            gap = torch.log_softmax(_logits(k, other.weight, other.bias, other.scale, other.softcap), 1)
            gap = torch.sub(logp, gap, out=gap)  # log p - log q
            out.append(gap.mul_(logp.exp_()).sum(1))
        kl = _join(out, hidden)
        ctx.save_for_backward(hidden, weight, bias, other_hidden, kl)
        ctx.settings = (other, scale, softcap, chunk)
        return kl

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, other_hidden, kl = ctx.saved_tensors
        other, scale, softcap, chunk = ctx.settings
        grads = _Gradients(ctx, hidden, weight, bias)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            raw = _logits(hidden[part], weight, bias, scale, softcap)
            logp = torch.log_softmax(raw, 1)
            d = torch.log_softmax(_logits(other_hidden[part], other.weight, other.bias, other.scale, other.softcap), 1)
            # g p (log p - log q - KL)
            d = torch.sub(logp, d, out=d).sub_(kl[part, None]).mul_(logp.exp_()).mul_(grad[part, None])
            grads.add(part, _chain(d, raw, scale, softcap))
        return *grads.finished(), None, None, None, None, None


class _FrozenHead(torch.autograd.Function):
    """With a frozen head d log p / d h = W[y] - p W is formed in the forward; the backward is a multiply."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, scale, softcap, extras, chunk, keep):  # noqa: ARG004
        logps, rest = [], [[] for _ in extras]
        jacobian = torch.empty_like(hidden)
        start = 0
        for h, y in zip(hidden.split(chunk), target_ids.split(chunk), strict=True):
            z = _logits(h, weight, bias, scale, softcap)
            raw = z.clone() if softcap is not None else z
            logp, _, total, values = _normalise(z, y, extras)
            logps.append(logp)
            for collected, value in zip(rest, values, strict=True):
                collected.append(value)
            part = jacobian[start : start + len(h)]
            z.div_(total[:, None])
            if softcap is None and hidden.dtype == z.dtype:
                torch.index_select(weight, 0, y, out=part)
                part.addmm_(z, weight, alpha=-1)
                if scale != 1.0:
                    part.mul_(scale)
            else:
                d = z.neg_().scatter_add_(1, y[:, None], torch.ones_like(logp)[:, None])
                torch.mm(_chain(d, raw, scale, softcap).to(hidden.dtype), weight, out=part)
            start += len(h)
        outputs = (_join(logps, hidden), *(_join(r, hidden) for r in rest))
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        (jacobian,) = ctx.saved_tensors
        return (jacobian * grad[:, None]).to(jacobian.dtype), None, None, None, None, None, None, None, None


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.cat(parts) if parts else like.new_zeros(0, dtype=wide)
