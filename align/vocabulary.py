"""What stands in configs/ and recipes/, the shipped ones and a user's own: found and read as text.

Imports nothing heavy: the completion of a shell waits for it. What the settings mean together is align.config's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


def shipped_root() -> Path:
    """The directory that holds configs, recipes and launch: inside a wheel, or the checkout."""
    package = Path(__file__).parent
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
    """Names of the groups of options, objective/loss among them."""
    root = shipped_root() / "configs"
    return sorted({p.parent.relative_to(root).as_posix() for p in root.rglob("*.yaml")} - {"."})


def settings_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Dotted key inside the file, default and comment above it, of each setting of an option's file."""
    comment: list[str] = []
    sections: list[str] = []
    for line in path.read_text().splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().lstrip("# "))
            continue
        if match := re.match(r"^((?:  )*)([a-z_0-9]+):\s*(.*)$", line):
            indent, key, value = match.groups()
            sections = sections[: len(indent) // 2]
            if value:
                yield ".".join([*sections, key]), value, " ".join(comment)
            else:
                sections.append(key)
        comment = []
