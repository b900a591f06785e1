"""The held-out score of constrained RLHF on DailyDialog, from measurements that others make."""

from __future__ import annotations

from collections.abc import Mapping

# smallest and largest values of tedmoskovitz/ConstrainedRL4LMs@11ac8fe, CRLHFEvaluationMetric
LEXICAL = {
    "bleu": (0.0, 0.004676984628247904),
    "sacrebleu": (5.330883519077344e-06, 0.11063353821330388),
    "rouge2": (0.0, 0.014568765083436451),
}
DIVERSITY = {"max_pred_length": (9, 183), "vocab_size_3": (41, 32227), "unique_3": (314, 36880)}


def dialogue_score(values: Mapping[str, float]) -> float:
    """Mean of two means, of LEXICAL and of DIVERSITY values, each value as its place between smallest and largest.

    Moskovitz et al. 2023, arXiv 2310.04373. Not cut off: values beyond the bounds give more than 1 or less than 0.
    """

    def mean_of(bounds: Mapping[str, tuple[float, float]]) -> float:
        return sum((values[name] - low) / (high - low) for name, (low, high) in bounds.items()) / len(bounds)

    return (mean_of(LEXICAL) + mean_of(DIVERSITY)) / 2
