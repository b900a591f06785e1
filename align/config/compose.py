"""The command line's words to checked settings: composition, refusal of unknown keys.

Imports nothing heavy: a misspelt key is refused before torch is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.config.explain import explain, leaves, nearest, one_line, written
from align.config.moved import refuse_moved, refuse_renamed, saved_settings
from align.config.overrides import read
from align.config.plugs import absent, own_optimizer, plugged, put_in
from align.config.schema import (
    EVALUATION,
    KINDS,
    SECTIONS,
    Config,
    ConfigError,
    OwnOptimizerConfig,
    TrainerConfig,
    may_change,
)
from align.config.shipped import shipped
from align.config.values import check_values
from align.jsons import Fields, Json
from align.vocabulary import groups as all_groups
from align.vocabulary import recipes, shipped_root

# New keys: a composer's numbers and an objective's weights by component, also those of a part of another, functions of
# data.margins, columns of data.columns, components of the reward and DeepSpeed's settings.
_OPEN = re.compile(
    r"composer\.|reward\.|callbacks\.|engine\.deepspeed\.|data\.(margins|columns)\.|objective\.([^=]+\.)?weights\."
)
# Settings that name a file or a directory, by their last part; a shell leaves the ~ of key=~/x as it is.
_PLACES = ("path", "dir", "directory", "cache_dir", "log_dir", "train", "heldout", "offline_data", "starts", "venv")


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Checked settings from `key=value` and `group=option` words, in Hydra's syntax.

    config_dir: a directory of your own with configs in the same groups and recipes in recipes/.
    Raises ConfigError, one line, for anything that is not a setting or not a possible value.
    """
    refuse_renamed(overrides)
    words, gone = absent(read(overrides, config_dir))
    words, plugs = plugged(words)
    words = [f"++{word}" if _OPEN.match(word) else word for word in words]
    _register_recipes(words, config_dir)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str((shipped_root() / "configs").resolve()), version_base="1.3"):
        if config_dir is not None:
            quoted = str(config_dir.resolve()).replace("\\", "\\\\").replace("'", "\\'")
            words.append(f"hydra.searchpath=['file://{quoted}']")
        try:
            full = hydra_compose("config", words, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(explain(words, error, config_dir)) from None
        choices = {g: o for g, o in full.hydra.runtime.choices.items() if o and not g.startswith("hydra")}
        own = [w for w in words if w.startswith("hydra.")]
        groups = {g: o for g, o in choices.items() if g != "recipe"}
        known = hydra_compose("config", [f"{g}={o}" for g, o in groups.items()] + own) if own else shipped(groups)
    OmegaConf.set_struct(full, False)
    del full["hydra"]
    refuse_moved(full)
    _refuse_unknown(full, known, choices)
    for group in gone:
        full.pop(group, None)
        choices.pop(group, None)
    put_in(full, plugs, choices, words)
    expand_home(full)
    remark = _one_length(full, overrides)
    config = _typed(full, choices)
    return replace(config, remarks=(remark,)) if remark else config


def _one_length(full: DictConfig, overrides: Sequence[str]) -> str | None:
    """trainer.epochs has no effect beside trainer.max_steps: of the two the one that the command line names counts.
    Of both steps count, as in a recipe. Sets the tree, returns what is to be said."""
    given = {word.lstrip("+").partition("=")[0] for word in overrides}
    epochs, steps = full.trainer.get("epochs"), full.trainer.get("max_steps")
    if "trainer.epochs" not in given or steps is None:
        return None
    if "trainer.max_steps" in given:
        return f"trainer.epochs={epochs} has no effect beside trainer.max_steps={steps}"
    full.trainer.max_steps = None
    return f"trainer.epochs={epochs} takes the place of the recipe's trainer.max_steps={steps}"


def expand_home(node: DictConfig) -> None:
    """A ~ before the settings that name places is the user's home."""
    for key, value in list(leaves(node)):
        if key.rpartition(".")[2] in _PLACES:
            names = value if isinstance(value, list) else [value]
            found = [os.path.expanduser(n) if isinstance(n, str) else n for n in names]
            if found != names:
                OmegaConf.update(node, key, found if isinstance(value, list) else found[0])


_READING = ("columns", "form", "format")  # of data: what a file's rows mean


def compose_run(overrides: Sequence[str]) -> Config:
    """The settings of an existing run, run.dir=DIR, with other data or sizes of forwards. Other data are read as the
    words say, not as the run's own.

    Raises ConfigError as compose does, and for a setting that is part of what the run is.
    """
    refuse_renamed(overrides)
    given = {key: value for key, _, value in (word.partition("=") for word in overrides)}
    path = Path(given.pop("run.dir", "nowhere")) / "config.yaml"
    if not path.is_file():
        raise ConfigError("run.dir=DIR is needed: the directory of a run")
    tree = saved_settings(path)
    # an older run has none, or fewer of their keys
    for group, option in (("engine", "local"), ("launch", "local"), ("data", "files"), ("trainer", "offline")):
        shipped = OmegaConf.load(shipped_root() / "configs" / group / f"{option}.yaml")
        tree[group] = OmegaConf.merge(shipped, tree.get(group) or {})
    allowed = {key for key, _ in leaves(tree) if key.split(".")[0] in ("data", "launch") or key in EVALUATION}
    read = {key: yaml.safe_load(value) for key, value in given.items()}
    # how the run's own rows are read says nothing of another file's
    if any(_other(tree.data, name, read[f"data.{name}"]) for name in ("train", "heldout") if f"data.{name}" in read):
        tree.data = OmegaConf.merge(tree.data, dict.fromkeys(_READING))
    for key, value in read.items():
        field = key.removeprefix("data.columns.")
        if key not in allowed and (field == key or not field.isidentifier()):
            raise ConfigError(f"{key} cannot be set for a finished run{nearest(key, allowed)}")
        if field != key and tree.data.columns is None:
            tree.data.columns = {}
        OmegaConf.update(tree, key, value, force_add=True)
    tree.run.dir = str(path.parent)
    _unresolved(tree)
    return _typed(tree, {"objective": str(tree.objective.get("_target_", "")).rpartition(".")[2]})


def _other(node: DictConfig, name: str, value: object) -> bool:
    """Whether a value is not what stands there; a place that the environment names is another one."""
    return OmegaConf.is_interpolation(node, name) or node.get(name) != value


def derived(config: Config, changes: Fields) -> Config:
    """The settings of a run of trainer=offline that is part of this one. changes: values by dotted key; a mapping takes
    the place of a whole section. Raises ConfigError for an impossible value."""
    tree = OmegaConf.create(OmegaConf.to_container(config.tree, resolve=False))
    assert isinstance(tree, DictConfig)
    tree.trainer = {f.name: getattr(config.trainer, f.name) for f in fields(TrainerConfig)} | {"kind": "offline"}
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, merge=False)
    return _typed(tree, config.choices)


def saved_model(config: Config, path: str | Path) -> Json:
    """The group model for a directory in Hugging Face form, trusted as far as the run's own model."""
    trust = bool(config.model.get("trust_remote_code", False))
    return {
        **{"_target_": "align.models.pretrained.from_hub", "path": str(path), "revision": None},
        **{"trust_remote_code": trust, "allow_pickle": False, "chat_template": None, "dtype": "auto"},
    }


def _unresolved(tree: DictConfig) -> None:
    """A setting whose environment variable is gone keeps its text: a finished run does not need its secrets again."""
    for key, value in leaves(tree):
        if isinstance(value, str) and "${oc.env:" in value:
            try:
                OmegaConf.select(tree, key)
            except OmegaConfBaseException:  # without its braces it is no interpolation
                OmegaConf.update(tree, key, re.sub(r"\$\{oc\.env:([^},]+)[^}]*\}", r"$\1", value))


def differences(old: DictConfig, new: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between a run's config.yaml and now and that may not: key -> (there, now)."""
    a, b = dict(leaves(old)), dict(leaves(new))
    if b.get("data.text") == "auto":  # what it came out as holds for the whole run
        a["data.text"] = "auto"
    changed = {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
    return {k: v for k, v in changed.items() if not may_change(k)}


def _register_recipes(words: Sequence[str], config_dir: Path | None) -> None:
    """Hand Hydra the recipe that the words ask for, or all if it builds on others: it copies all it knows each time."""
    known = recipes(config_dir)
    asked = [word.partition("=")[2].strip("'\"") for word in words if word.lstrip("+~").startswith("recipe=")]
    found = {name: _node(known[name]) for name in asked if name in known}
    if any("recipe" in str(node.get("defaults")) for node, _ in found.values()):
        found = {name: _node(path) for name, path in known.items()}
    _store_recipes(tuple((name, known[name], changed) for name, (_, changed) in found.items()))


def _node(path: Path) -> tuple[DictConfig, int]:
    """A recipe and when it was written. Raises ConfigError."""
    try:
        changed = path.stat().st_mtime_ns
        node = _recipe(path, changed)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {one_line(error)}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: must hold settings, `key: value` a line")
    return node, changed


@lru_cache(maxsize=1)
def _store_recipes(found: tuple[tuple[str, Path, int], ...]) -> None:
    """In the place of those that Hydra was handed last."""
    store = ConfigStore.instance()
    store.repo.pop("recipe", None)
    for name, path, changed in found:
        group, _, option = f"recipe/{name}".rpartition("/")
        store.store(group=group, name=option, node=_recipe(path, changed), package="_global_")


@lru_cache
def _recipe(path: Path, _changed: int) -> DictConfig | ListConfig:
    return OmegaConf.load(path)


def _refuse_unknown(full: DictConfig, known: DictConfig, choices: dict[str, str]) -> None:
    """Hydra adds what a recipe invents; here it is an error, as on the command line."""
    allowed = {key for key, _ in leaves(known)}
    for key, _ in leaves(full):
        if key.startswith("composer.") and _by_component(known, key.rpartition(".")[0]):
            continue
        if key.startswith("reward.") and key.count(".") > 1:  # its keys are those of what it names
            continue
        if key.startswith(("engine.deepspeed.", "callbacks.")):  # the engine, or the class that is named, knows them
            continue
        if key not in allowed and not any(key.startswith(f"{a}.") for a in allowed):
            if key.replace(".", "/") in all_groups():
                raise ConfigError(f"{key} is a group of settings: choose one with {key.replace('.', '/')}=...")
            group = key.split(".")[0]
            hint = f"; {group}={choices[group]} has no such key" if group in choices else ""
            raise ConfigError(f"{key} is not a setting{hint}{nearest(key, allowed)}")


def _by_component(known: DictConfig, section: str) -> bool:
    """Whether the names below a section are the reward's components."""
    if "." not in section:
        return False
    node = OmegaConf.select(known, section)
    return isinstance(node, DictConfig) and "_target_" not in node


def _typed(tree: DictConfig, choices: dict[str, str]) -> Config:
    missing = [key for key, value in leaves(tree) if value == "???"]
    if missing:
        raise ConfigError(f"{missing[0]} is required: add {missing[0]}=...")
    try:  # the tree itself keeps its interpolations: an environment variable's value is not for config.yaml
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{_first_line(error)}") from None
    assert isinstance(values, dict)
    sections = {}
    for name, cls in SECTIONS.items():
        if values.get(name) is None and name == "collect":
            sections[name] = None
            continue
        if name in KINDS:
            kind = (values[name] or {}).get("kind")
            if kind not in KINDS[name]:
                raise ConfigError(f"{name}.kind={kind}: must be one of {', '.join(KINDS[name])}")
            cls = KINDS[name][kind]
        if name == "optimizer" and "_target_" in values[name]:
            values[name], cls = own_optimizer(values[name]), OwnOptimizerConfig
        schema = OmegaConf.structured(cls)
        OmegaConf.set_readonly(schema, False)
        try:
            sections[name] = OmegaConf.to_object(OmegaConf.merge(schema, values[name]))
        except OmegaConfBaseException as error:
            key = f"{name}.{error.full_key}" if error.full_key else name
            raise ConfigError(f"{key}={written(OmegaConf.select(tree, key))}: {_first_line(error)}") from None
    for key, kind in (("seed", int), ("merge", bool)):
        if not isinstance(values[key], kind) or (kind is int and isinstance(values[key], bool)):
            given = written(values[key])
            raise ConfigError(f"{key}={given}: must be {'true or false' if kind is bool else 'an integer'}")
    config = Config(
        seed=values["seed"],
        merge=values["merge"],
        model=tree.model,
        objective=tree.objective,
        rollout=tree.rollout,
        advantage=tree.get("advantage"),
        reward=tree.get("reward"),
        callbacks=tree.get("callbacks"),
        composer=tree.get("composer"),
        pairs=tree.get("pairs"),
        choices=choices,
        tree=tree,
        **sections,
    )
    check_values(config)
    return config


def _first_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's message without the key and type that it appends."""
    return str(error.msg or error).splitlines()[0]
