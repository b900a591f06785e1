"""A coefficient of a KL in the reward that is moved towards a target."""

from __future__ import annotations


def kl_coefficient(coefficient: float, kl: float, target: float) -> float:
    """Coefficient after a step, moved towards a KL of `target`: c (1 + 0.1 clip((KL - target) / target, -0.2, 0.2)).

    Ziegler et al. 2019, arXiv 1909.08593, with the constants of ConstrainedRL4LMs@11ac8fe.
    """
    return coefficient * (1 + 0.1 * min(max((kl - target) / target, -0.2), 0.2))
