"""Parts that have another place than they had: runs of before go on, and a user's file hears of it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from align.config.explain import leaves
from align.config.schema import ConfigError

# beginning of a dotted path as it was -> as it is
MOVED = {"align.pretrained.": "align.models.pretrained."}


def _now(value: object) -> str | None:
    """The dotted path of today, or None if it has not moved."""
    for old, new in MOVED.items():
        if isinstance(value, str) and value.startswith(old):
            return new + value.removeprefix(old)
    return None


def saved_settings(path: Path) -> DictConfig:
    """The settings of a run, of its config.yaml, with its parts where they stand today."""
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    for key, value in list(leaves(tree)):
        if key.endswith("_target_") and (now := _now(value)):
            OmegaConf.update(tree, key, now)
    return tree


def refuse_moved(tree: DictConfig) -> None:
    """Raises ConfigError for a part of ours that has moved."""
    for key, value in leaves(tree):
        if key.endswith("_target_") and (now := _now(value)):
            raise ConfigError(f"{key}={value} has moved; use {key}={now}")
