"""The mathematics of averaging: pure functions on numbers and tensors. Files and memory are the engine's.

Axis letters here: M models, N models without the base, D entries of a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# mergekit's floor of the product of two norms; below it a cosine shrinks towards 0
_MERGEKIT_FLOOR = 1e-6


def uniform_mean(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, in the order given, divided once by how many there are."""
    return weighted_sum(tensors, [1.0] * len(tensors)) / len(tensors)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of w * x in the dtype of the tensors. A weight of 0 takes no part: -0.0 and the other's bits stay.

    Product and sum are rounded one after the other, so that no result depends on how a tensor was cut into spans.
    """
    total = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight == 0:
            continue
        term = tensor if weight == 1 else tensor * weight
        total = term if total is None else total + term
    return torch.zeros_like(tensors[0]) if total is None else total


def metric_weights(values: Sequence[float], penalty: float, kind: str) -> list[float]:
    """Weights from a number of each model, sum 1: loss^-penalty or steps^penalty, normalised.

    penalty 0: uniform; towards infinity: the best alone. Computed as a softmax of logarithms: no power overflows.
    kind: "loss" (lower is better) or "steps" (later is better); values > 0.
    The idea is of MWA, arXiv 2504.18580, whose formula could not be read: this form is align's own.
    """
    if kind not in ("loss", "steps"):
        raise ValueError(f"kind={kind}: must be loss or steps")
    if not all(value > 0 for value in values):
        raise ValueError(f"values={list(values)}: must be above 0")
    sign = -1.0 if kind == "loss" else 1.0
    logits = [sign * penalty * math.log(value) for value in values]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def stock_ratio(gram: Tensor, clamp: bool) -> Tensor:
    """Model Stock's weight t of the mean, 1 - t of the base. gram: [..., N, N] dot products of the offsets; t [...].

    t = N c / (1 + (N - 1) c), c the mean of the cosines of all pairs of offsets.
    clamp: t from 0 to 1, and 0 wherever c <= 0, also beyond the pole at c = -1 / (N - 1). Without it as mergekit: no
    bounds, and cosines whose product of norms is below 1e-6 shrink.
    Jang et al. 2024, Model Stock, arXiv 2403.19522; the mean over pairs is mergekit@a6e4028's, the paper does not say.
    """
    count = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    first, second = torch.triu_indices(count, count, 1, device=gram.device)
    dots = gram[..., first, second]
    products = norms[..., first] * norms[..., second]
    # an offset of zero has no direction: cosine 0, hence the base
    floor = torch.finfo(gram.dtype).tiny if clamp else _MERGEKIT_FLOOR
    cosine = (dots / products.clamp(min=floor)).clamp(-1, 1).mean(-1)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return torch.where(cosine > 0, ratio, torch.zeros_like(ratio)).clamp(max=1) if clamp else ratio


def offsets_gram(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """Dot products of the offsets x - base over the last axis: [..., N, N] float64. bfloat16 would lose the offsets."""
    offsets = torch.stack([x.double() - base.double() for x in tuned], -2)  # [..., N, D]
    return offsets @ offsets.transpose(-1, -2)


def stock(base: Tensor, tuned: Sequence[Tensor], ratio: Tensor | float) -> Tensor:
    """t * mean + (1 - t) * base."""
    return ratio * uniform_mean(tuned) + (1 - ratio) * base


def layer_of(key: str) -> int | None:
    """The number of the layer that a tensor belongs to."""
    found = _LAYER.search(key)
    return int(found.group(1)) if found else None


def block_ratio(key: str, cuts: Sequence[int], ratios: Sequence[float], other: float) -> float:
    """Weight of the model before alignment for one tensor.

    A layer up to cuts[0] has ratios[0], one up to cuts[1] ratios[1], ..., norms inside layers too. Outside them: heads
    (lm_head, score) and norms have `other`, embeddings ratios[0].
    Lin et al. 2023, Mitigating the Alignment Tax of RLHF, arXiv 2309.06256; merge_split of the
    repository avalonstrel/Mitigating-the-Alignment-Tax-of-RLHF@40165e6.
    Differs: score and GPT-2's ln_f count as head and norm, which the code does not know; no split0.
    """
    layer = layer_of(key)
    if layer is not None:
        return ratios[sum(layer > cut for cut in cuts)]
    is_head = any(part in ("lm_head", "score", "gate", "ln_f") for part in key.split("."))
    return other if is_head or "norm" in key else ratios[0]


def normalised_alphas(raw: Sequence[float], mean: float, epsilon: float) -> list[float]:
    """Adaptive averaging's ratios of K blocks: mean * K * (s(a) + epsilon) / sum of (s(a) + epsilon), s the logistic.

    Their mean is `mean`; one may exceed 1 if mean * K does. arXiv 2309.06256; weight_mask_merge.py of the repository.
    """
    parts = [1 / (1 + math.exp(-a)) + epsilon for a in raw]
    return [mean * len(raw) * part / sum(parts) for part in parts]


def layer_groups(num_layers: int, num_blocks: int) -> list[int]:
    """The block of each layer as adaptive averaging cuts them.

    Three blocks end at layers 10 and 20 of more than 30 layers, else at 7 and 15; other numbers are equal shares, the
    remainder in the last. arXiv 2309.06256; mask_trainer.py of the repository, get_mask_alpha.
    """
    if not 1 <= num_blocks <= num_layers:
        raise ValueError(f"{num_blocks} blocks of {num_layers} layers: must be from 1 to the number of layers")
    if num_blocks == 3:
        cuts = (11, 21) if num_layers > 30 else (8, 16)
        return [sum(layer >= cut for cut in cuts) for layer in range(num_layers)]
    share = num_layers // num_blocks
    return [min(layer // share, num_blocks - 1) for layer in range(num_layers)]


def top_k_masks(task_vectors: Sequence[Tensor], density: float, strict: bool = False) -> list[Tensor]:
    """Where the largest |entries| of one task vector, given in parts, lie: k = density * size of them, bool.

    Ties with the k-th largest are kept, zeros never. strict: only what exceeds the k-th largest, one entry fewer, as
    the authors' code does. He et al. 2024, Localize-and-Stitch, arXiv 2408.13656; repository@8b8ea46, create_basepatch.
    """
    sizes = torch.cat([vector.abs().flatten() for vector in task_vectors])
    k = max(1, int(density * len(sizes)))
    least = sizes.kthvalue(len(sizes) - k + 1).values
    return [vector.abs() > least if strict else (vector.abs() >= least) & (vector != 0) for vector in task_vectors]


def stitch(base: Tensor, tuned: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """base + sum of mask / count * (x - base); count: how many masks hold the entry.

    Localize-and-Stitch, arXiv 2408.13656; repository@8b8ea46, Stitcher.
    """
    count = torch.stack([mask.to(base.dtype) for mask in masks]).sum(0).clamp(min=1)
    change = torch.zeros_like(base)
    for x, mask in zip(tuned, masks, strict=True):
        change += mask.to(base.dtype) / count * (x - base)
    return base + change


def concatenated_factors(
    down: Sequence[Tensor], up: Sequence[Tensor], scalings: Sequence[float], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """One pair of LoRA factors, with scaling 1, whose product is the weighted sum of the deltas: ranks add up.

    down: A [r_i, in]; up: B [out, r_i]; delta_i = scaling_i * B_i A_i. The sum of products is exact; a product of
    summed factors, which PEFT calls "linear", has cross terms.
    """
    parts = [b * (w * s) for b, s, w in zip(up, scalings, weights, strict=True)]
    return torch.cat(list(down), 0), torch.cat(parts, 1)
