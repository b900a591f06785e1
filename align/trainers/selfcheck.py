"""Whether what is trained computes what the model means, before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from align.data.chat import stop_ids
from align.engine.base import shape_of
from align.models.policy import Discrepancy, Network, probe_layout
from align.models.weights import check_tokens
from align.trainers.session import SelfCheckError, Session
from align.types import Example, Layout

# The same numbers computed in other batches or by other kernels: nats per token.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}


def check_tokens_of(session: Session, model: Any, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
    """Raises ValueError if the model cannot read these rows of token ids, or end a turn."""
    size = shape_of(model.get_input_embeddings().weight)[0]
    ends = stop_ids(session.tokenizer, model.generation_config)
    name = f"model {session.pretrained.name}"
    check_tokens(name, session.tokenizer, size, itertools.chain(rows, [ends]))


def check_layout(session: Session, policy: Network, examples: Sequence[Example]) -> str:
    """How far what is trained is from the model's own forward, in words. Raises SelfCheckError."""
    if not examples:
        return describe(Discrepancy(0.0, 0.0))
    discrepancy, tolerance = _discrepancy(session, policy, examples, policy.layout), TOLERANCE[session.precision]
    if discrepancy.beyond_rounding <= tolerance:
        return describe(discrepancy)
    packed = policy.layout != "padded"
    if packed and _discrepancy(session, policy, examples, "padded").beyond_rounding <= tolerance:
        cure = "use trainer.layout=padded"
    else:
        cure = "its head or attention is not known to align"
    raise SelfCheckError(
        f"self-check: log-probs in layout {policy.layout} differ by {discrepancy.largest:.2g} nats per token from "
        f"those of {type(policy.causal_lm).__name__}'s own forward; {cure}, report the model"
    )


def describe(discrepancy: Discrepancy) -> str:
    """What passed. Logits of 16 bits round more than align does: of a large difference that is said."""
    message = f"log-probs are the model's own to {discrepancy.largest:.1e} nats"
    if discrepancy.largest <= TOLERANCE[torch.float32]:
        return message
    return f"{message}, {discrepancy.beyond_rounding:.1e} beyond the rounding of its own logits"


def _discrepancy(session: Session, policy: Network, examples: Sequence[Example], layout: Layout) -> Discrepancy:
    """Of all processes the one that is furthest off."""
    with session.autocast():
        return max(session.world.gather(probe_layout(policy, examples, layout)), key=lambda a: a.beyond_rounding)
