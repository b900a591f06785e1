"""Parts of the tests' own that take the place of a shipped one and are made with its settings."""

from __future__ import annotations

import json
from typing import Any

import yaml

from align.config import quoted, shipped_root


def node_of(group: str, option: str) -> dict[str, Any]:
    """The YAML of a shipped option, not composed: for what is asked while tests are collected, in every worker."""
    return yaml.safe_load((shipped_root() / "configs" / group / f"{option}.yaml").read_text())


def variant(group: str, option: str, target: str) -> list[str]:
    """Words for a target with the keys of an option: `GROUP._target_=` alone would drop them."""
    node = node_of(group, option)
    keys = {key: value for key, value in node.items() if key not in ("_target_", "_partial_", "defaults")}
    below = [f"{group}/{name}={one}" for part in node.get("defaults", []) if part != "_self_"
             for name, one in part.items()]  # fmt: skip
    values = {key: quoted(value) if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}
    return [*below, f"{group}._target_={target}", *(f"{group}.{key}={value}" for key, value in values.items())]
