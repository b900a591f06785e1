"""What the components of a reward refuse before a model is there."""

from __future__ import annotations

from collections.abc import Mapping

from align import build
from align.config.schema import Config, DataConfig
from align.data.sources import columns, locate_all
from align.rewards.build import Part, examined
from align.rewards.gold import Gold


def examine(config: Config, lora: bool) -> dict[str, Part]:
    """What each component is. Raises ValueError, naming the setting, for one that cannot be made of its keys, or that
    asks for a column which no row of data.train has. lora: the policy is a LoRA model."""
    parts = examined(build.reward_node(config), lora)
    _check_columns(
        config.data, "data.train", {c: f"reward.{name}" for name, part in parts.items() for c in part.columns}
    )
    return parts


def check_gold(data: DataConfig) -> None:
    """Raises ValueError for a data.gold that cannot be called, or that asks for a column which no held-out row has."""
    assert data.gold is not None
    key = "data.train" if data.heldout is None else "data.heldout"
    _check_columns(data, key, dict.fromkeys(Gold(data.gold).columns, f"data.gold={data.gold}"))


def _check_columns(data: DataConfig, key: str, missing: Mapping[str, str]) -> None:
    """missing: columns, and the setting that asks for each. Of rows it reads up to the first one that has them all,
    usually one. What a form or the user's own functions make of a source, and what is on the hub, is not known here."""
    if not missing or data.format is not None or data.loader is not None or data.form is not None:
        return
    seen: set[str] = set(data.columns or ())
    for source in locate_all(data.train if key == "data.train" else data.heldout, key):
        known = columns(source)
        if known is None:
            return
        for names in known:
            seen |= names
            if missing.keys() <= seen:
                return
    column = min(missing.keys() - seen)
    raise ValueError(
        f"{missing[column]}: asks for the column {column}, which no row of {key} has; there are "
        f"{', '.join(sorted(seen)) or 'none'}"
    )
