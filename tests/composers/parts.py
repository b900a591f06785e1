"""Composers of the shipped options, and made-up steps to tell them."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf

from align import build
from align.composers.base import Observed

OPTIONS = sorted((Path(__file__).parents[2] / "configs" / "composer").glob("*.yaml"))
NAMES = ("helpful", "brief", "clear")
THRESHOLDS = {"helpful": 0.4, "brief": 0.5, "clear": 0.3}
# what an option leaves to the user
NEEDED = {
    "satisficing": {"thresholds": THRESHOLDS},
    "lagrangian_log": {"thresholds": {"brief": 0.5, "clear": 0.3}, "objective": {"helpful": 1.0}},
    "lagrangian_search": {
        "search": {
            "low": {"helpful": 0.2, "brief": 0.3, "clear": 0.1},
            "high": {"helpful": 0.6, "brief": 0.7, "clear": 0.5},
            "metric": "gold",
            "steps": 2,
        }
    },
} | {f"lagrangian_{kind}": {"thresholds": THRESHOLDS} for kind in ("mu", "xi", "softplus", "pid")}


def option(stem, names=NAMES, needed=True, **settings):
    """The composer of configs/composer/<stem>.yaml with what it needs, and with other settings."""
    path = next(p for p in OPTIONS if p.stem == stem)
    node = OmegaConf.merge(OmegaConf.load(path), NEEDED.get(stem, {}) if needed else {}, settings)
    return build.composer(node, names)


def observed(step, num=3, validation=True):
    """Step `step` of a made-up run, with everything that can be told."""
    generator = torch.Generator().manual_seed(step)
    means, influences, held = torch.rand(3, num, generator=generator, dtype=torch.float64)
    return Observed(
        means=means,
        lowest=means - 0.3,
        highest=means + 0.3,
        influences=influences,
        learning_rate=1e-6,
        validation=held if validation else None,
        gold=float(held.mean()) if validation else None,
    )


def call(composer, rows=8, seed=0):
    """A call with made-up streams, and context where the needs say so."""
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randn(rows, len(composer.streams), generator=generator, dtype=torch.float64)
    context = None
    if "uncertainty" in composer.needs:
        context = torch.rand(rows, generator=generator, dtype=torch.float64)
    if "direction" in composer.needs:
        context = torch.nn.functional.normalize(streams.roll(1, 0), dim=1)
    return composer(streams, None, context)
