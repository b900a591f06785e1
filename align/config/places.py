"""Where settings are found: the shipped configs and recipes, and a user's own beside them."""

from __future__ import annotations

import os
from pathlib import Path


def shipped_root() -> Path:
    """The directory that holds configs, recipes and launch: inside a wheel, or the checkout."""
    package = Path(__file__).parent.parent
    shipped = package / "_shipped"
    return shipped if shipped.is_dir() else package.parent


def cache_root() -> Path:
    """Where converted models and cached reference log-probs are kept: $ALIGN_CACHE, or ~/.cache/align."""
    return Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align")


def recipes(config_dir: Path | None = None) -> dict[str, Path]:
    """Name -> file of every shipped recipe and of those in <config_dir>/recipes."""
    found = {}
    for root in [shipped_root() / "recipes"] + ([config_dir / "recipes"] if config_dir else []):
        for path in sorted(root.rglob("*.yaml")):
            found[path.relative_to(root).with_suffix("").as_posix()] = path
    return found


def options(group: str, config_dir: Path | None = None) -> list[str]:
    """Names of the options of a group such as model or objective/loss: the shipped ones and those in <config_dir>."""
    roots = [shipped_root() / "configs"] + ([config_dir] if config_dir else [])
    return sorted({p.stem for root in roots for p in (root / group).glob("*.yaml")})


def groups() -> list[str]:
    root = shipped_root() / "configs"
    return sorted({p.parent.relative_to(root).as_posix() for p in root.rglob("*.yaml")} - {"."})
