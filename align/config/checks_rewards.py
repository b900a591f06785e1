"""What the components of a reward refuse before a model is there."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from align.config.schema import Config
from align.rewards.build import Part, examined


def reward_node(config: Config) -> dict[str, Any]:
    """The node `reward`, resolved."""
    node = OmegaConf.to_container(config.reward, resolve=True)  # type: ignore[arg-type]
    assert isinstance(node, dict)
    return node  # type: ignore[return-value]


def examine(config: Config) -> dict[str, Part]:
    """What each component is. Raises ValueError, naming the setting, for one that cannot be made of its keys."""
    return examined(reward_node(config))
