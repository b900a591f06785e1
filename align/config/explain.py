"""What to say of a word that is no setting: one line, with the nearest that is; and the list of all there are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from omegaconf import DictConfig, ListConfig, OmegaConf

from align.config.schema import limits
from align.vocabulary import groups, options, recipes, settings_of, shipped_root


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting; a list is one value. Interpolations are not resolved."""
    for key in node:
        raw = node._get_node(key)
        name = f"{prefix}{key}"
        if isinstance(raw, DictConfig) and not raw._is_none() and not raw._is_missing():
            yield from leaves(raw, name + ".")
        elif isinstance(raw, ListConfig):
            yield name, OmegaConf.to_container(raw, resolve=False)
        else:
            yield name, None if raw is None else raw._value()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def explain(words: Sequence[str], error: Exception, config_dir: Path | None) -> str:
    """One line for what Hydra refuses, with the nearest name that it would accept."""
    text = one_line(error)
    found = {g: options(g, config_dir) for g in groups()} | {"recipe": sorted(recipes(config_dir))}
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        key = key.split("@")[0]
        named = value == "null" or re.search(rf"\b{re.escape(key)}\b", text)
        if key in found and value not in found[key] and named:
            near = difflib.get_close_matches(value.lower(), found[key], 1, 0.5)
            tip = f"did you mean {near[0]}? " if near else ""
            return f"{key}={value}: no such option; {tip}Options: {', '.join(found[key])}"
    with_groups = [w for w in words if w.partition("=")[0] in found or w.startswith("hydra.")]
    try:
        base = hydra_compose("config", with_groups)
    except Exception:  # the groups themselves do not compose: Hydra's own words are the best there are
        return text
    allowed = {key for key, _ in leaves(base)}
    sections = {key.rsplit(".", 1)[0] for key in allowed if "." in key}
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if word not in with_groups and key not in allowed | sections:
            from align.config.foreign import hint, misspelt  # a table of words that only a wrong one needs

            known = allowed | set(found)
            tip = _elsewhere(key, config_dir) or hint(key) or misspelt(key, known) or nearest(key, known)
            return f"{key} is not a setting{tip}"
    return text


def _elsewhere(key: str, config_dir: Path | None) -> str:
    """Whether another option of a group has a key, as a hint: "" if none has."""
    group, _, name = key.partition(".")
    roots = [shipped_root() / "configs"] + ([config_dir] if config_dir else [])
    having = [
        option
        for option in options(group, config_dir)
        for root in roots
        if (root / group / f"{option}.yaml").is_file()
        and name in (yaml.safe_load((root / group / f"{option}.yaml").read_text()) or {})
    ]
    if not 0 < len(having) < 4:  # of many the nearest name says more
        return ""
    return f" here; {' and '.join(f'{group}={option}' for option in having)} {'have' if len(having) > 1 else 'has'} it"


def nearest(key: str, allowed: set[str]) -> str:
    """A suggestion: the nearest full name, or the nearest by the last part alone."""
    near = difflib.get_close_matches(key, sorted(allowed), 1, 0.6)
    if not near:
        last = {a.rsplit(".", 1)[-1]: a for a in sorted(allowed)}
        near = [last[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.6)]
    return f"; did you mean {near[0]}?" if near else "; `align check --keys` lists them all"


def written(value: object) -> str:
    """A value as the user types it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def keys_with_help() -> list[str]:
    """A line per setting of every option: key, default, the comment above it in configs/, and what it may be."""
    root, may_be = shipped_root() / "configs", limits()
    lines = []
    for path in sorted(root.rglob("*.yaml")):
        group = path.parent.relative_to(root).as_posix().replace("/", ".")
        lines.append(f"[{path.relative_to(root).with_suffix('').as_posix()}]")
        prefix = "" if group == "." else f"{group}."
        for key, value, comment in settings_of(path):
            limit = f" [{may_be[prefix + key]}]" if prefix + key in may_be else ""
            lines.append(f"  {prefix}{key}={value}  {comment}{limit}")
    return lines
