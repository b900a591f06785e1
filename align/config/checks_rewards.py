"""What the components of a reward refuse before a model is there."""

from __future__ import annotations

from collections.abc import Mapping

from align import build
from align.config.schema import Config
from align.data.sources import locate_all, read
from align.rewards.build import Part, examined


def examine(config: Config) -> dict[str, Part]:
    """What each component is. Raises ValueError, naming the setting, for one that cannot be made of its keys, or that
    asks for a column which no row of data.train has."""
    parts = examined(build.reward_node(config))
    if any(part.columns for part in parts.values()):
        _check_columns(config.data.train, parts)
    return parts


def _check_columns(train: object, parts: Mapping[str, Part]) -> None:
    """Reads up to the first row that has them all: usually one. Of tables and the hub nothing is read here."""
    sources = locate_all(train, "data.train")
    if not all(source.kind in ("jsonl", "json") for source in sources):
        return
    missing = {column: name for name, part in parts.items() for column in part.columns}
    seen: set[str] = set()
    for source in sources:
        for _, row in read(source):
            if isinstance(row, dict):
                seen |= row.keys()
            if missing.keys() <= seen:
                return
    column = min(missing.keys() - seen)
    raise ValueError(
        f"reward.{missing[column]}: asks for the column {column}, which no row of data.train has; there are "
        f"{', '.join(sorted(seen)) or 'none'}"
    )
