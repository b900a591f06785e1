"""What a general preference model says of the completions of a prompt, from its head's outputs.

Zhang et al. 2024, arXiv 2410.02197; the training side is objectives/general_preference.py.
"""

from __future__ import annotations

import numpy as np

from align.jsons import Fields


def preference_table(form: Fields, outputs: np.ndarray, gates: np.ndarray | None) -> np.ndarray:
    """Logits [R, R] of "row i is preferred to row j". outputs: [R, D]; gates: [R, D / 2] before their softmax."""
    v = outputs
    if form.get("normalise"):
        v = v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)  # as torch's normalize
    even, odd = v[:, 0::2], v[:, 1::2]
    # <R v_i, v_j> block by block, R = [[0, -1], [1, 0]]
    blocks = even[:, None] * odd[None, :] - odd[:, None] * even[None, :]
    if gates is not None:
        weights = np.exp(gates - gates.max(1, keepdims=True))
        blocks = blocks * (weights / weights.sum(1, keepdims=True))[:, None]
    return blocks.sum(2) / form["tau"]


def mean_preferences(form: Fields, outputs: np.ndarray, gates: np.ndarray | None) -> np.ndarray:
    """For each row [R] the mean logit over all rows, itself included: of two, their difference is the logit."""
    return preference_table(form, outputs, gates).mean(1)
