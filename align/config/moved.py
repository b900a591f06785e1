"""Parts and settings under their former names: read in the config.yaml of earlier runs, refused everywhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from align.config.explain import leaves, written
from align.config.schema import KINDS, SECTIONS, ConfigError

# beginning of a dotted path as it was -> as it is
MOVED = {"align.pretrained.": "align.models.pretrained."}

# setting as it was -> as it is
RENAMED = {
    "trainer.recompute": "trainer.activation_checkpointing",
    "trainer.inner_epochs": "trainer.ppo_epochs",
    "trainer.inner_batches": "trainer.num_minibatches",
    "trainer.extra_draws": "trainer.dynamic_sampling",
    "trainer.engine_tolerance": "trainer.rollout_logp_tolerance",
    "trainer.stop_after": "trainer.early_stopping_patience",
    "optimizer.warmup_fraction": "optimizer.warmup_ratio",
    "optimizer.final_fraction": "optimizer.min_lr_ratio",
    "launch.server_words": "launch.server_args",
}
_FORMER = {new: old for old, new in RENAMED.items()}
_REFERENCE = re.compile(r"\$\{(" + "|".join(map(re.escape, RENAMED)) + r")\}")


def former(key: str) -> str | None:
    """The name that a setting had before, or None."""
    return _FORMER.get(key)


def saved_settings(path: Path) -> DictConfig:
    """The settings of a run, of its config.yaml, with the parts and names of today and data.text as it came out."""
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    if "data" in tree and tree.data.get("text", "auto") == "auto":
        text = settled_text(path)
        if text is not None:
            tree.data.text = text
    for key, value in list(leaves(tree)):
        name = RENAMED.get(key, key)
        now = _now(key, value)
        if name == key and now is None:
            continue
        OmegaConf.update(tree, name, value if now is None else now)
        if name != key:
            section, _, last = key.rpartition(".")
            del tree[section][last]
    _add_later(tree)
    return tree


def _add_later(tree: DictConfig) -> None:
    """Add the settings that came after the run: those with a default in the schema, which is how it was before them."""
    for name, cls in SECTIONS.items():
        node = tree.get(name)
        if not isinstance(node, DictConfig):
            continue
        kinds = KINDS.get(name, {})
        for field in fields(kinds.get(node.get("kind"), cls)):
            if field.name not in node and field.default is not MISSING:
                node[field.name] = field.default


def refuse_renamed(words: Sequence[str]) -> None:
    """Raises ConfigError for a word of the command line that sets a setting by its former name."""
    for word in words:
        key, equals, value = word.lstrip("+~").partition("=")
        if key in RENAMED:
            raise ConfigError(f"{key}{equals}{value} has another name; use {RENAMED[key]}{equals}{value}")


def settled_text(path: Path) -> str | None:
    """What data.text came out as in the run of a config.yaml: plain in one from before there was a choice; None: it is
    not known yet."""
    if OmegaConf.select(OmegaConf.load(path), "data.text") is None:
        return "plain"
    found = path.with_name("resolved.json")
    return json.loads(found.read_text()).get("text") if found.is_file() else None


def refuse_moved(tree: DictConfig) -> None:
    """Raises ConfigError for a part of ours that has moved, and a setting by its former name, as a file has them."""
    for key, value in leaves(tree):
        if key in RENAMED:
            raise ConfigError(f"{key}={written(value)} has another name; use {RENAMED[key]}={written(value)}")
        now = _now(key, value)
        if now is not None:
            raise ConfigError(f"{key}={value} has moved; use {key}={now}")


def _now(key: str, value: object) -> str | None:
    """A value that names what has another name: as it is today; None for any other."""
    if not isinstance(value, str):
        return None
    if key.endswith("_target_"):
        for old, new in MOVED.items():
            if value.startswith(old):
                return new + value.removeprefix(old)
    now = _REFERENCE.sub(lambda found: "${" + RENAMED[found[1]] + "}", value)
    return None if now == value else now
