"""Experts of mixture models in the run's precision, registered with transformers' experts interface as "align_experts".

Grouped products are in no list of autocast's, and transformers casts their input to the weights' type: with float32
weights, which are what is trained, experts would run in float32 while all else runs in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "align_experts"
_PLAIN = "grouped_mm"


def use(config: Any) -> None:
    """Let a model of this config take them in the place of transformers' grouped products."""
    if getattr(config, "_experts_implementation", None) == _PLAIN:
        config._experts_implementation = NAME


def experts_forward(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Output [T, H] of hidden states [T, H] through the experts [T, k] chosen for each; in the type of
    autocast where it is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(experts, hidden, top_k_index, top_k_weights)
    cast: Any = _Cast(experts, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(cast, hidden, top_k_index, top_k_weights)


class _Cast:
    """A module's attributes, its weights in another type; their gradients go to the weights themselves."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self._module = module
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
