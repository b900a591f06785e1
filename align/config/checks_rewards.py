"""What the components of a reward refuse before a model is there."""

from __future__ import annotations

from collections.abc import Mapping

from align import build
from align.config.schema import Config, DataConfig
from align.data.sources import columns, locate_all
from align.rewards.build import Part, examined


def examine(config: Config, lora: bool) -> dict[str, Part]:
    """What each component is. Raises ValueError, naming the setting, for one that cannot be made of its keys, or that
    asks for a column which no row of data.train has. lora: the policy is a LoRA model."""
    parts = examined(build.reward_node(config), lora)
    if any(part.columns for part in parts.values()):
        _check_columns(config.data, parts)
    return parts


def _check_columns(data: DataConfig, parts: Mapping[str, Part]) -> None:
    """Of rows it reads up to the first one that has them all, usually one. What a form or the user's own functions make
    of a source, and what is on the hub, is not known here."""
    if data.format is not None or data.loader is not None or data.form is not None:
        return
    missing = {column: name for name, part in parts.items() for column in part.columns}
    seen: set[str] = set(data.columns or ())
    for source in locate_all(data.train, "data.train"):
        known = columns(source)
        if known is None:
            return
        for names in known:
            seen |= names
            if missing.keys() <= seen:
                return
    column = min(missing.keys() - seen)
    raise ValueError(
        f"reward.{missing[column]}: asks for the column {column}, which no row of data.train has; there are "
        f"{', '.join(sorted(seen)) or 'none'}"
    )
