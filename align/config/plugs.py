"""KEY._target_=module.Thing: a class or function of one's own in the place of an option, with the keys beside it."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from align.config.explain import nearest
from align.config.overrides import value_of
from align.config.schema import ConfigError
from align.jsons import Json
from align.vocabulary import groups

# Groups whose options are settings of align's own and name no class.
_NO_CLASS = ("data", "trainer", "log", "engine", "launch", "collect")
# Groups of which a run may have no option at all.
_MAY_BE_ABSENT = ("collect", "advantage", "reward", "composer", "pairs")
# What of the optimiser is the loop's: it sets the rate of each step, and clips.
_SCHEDULE = ("lr", "max_grad_norm", "schedule", "warmup_ratio", "min_lr_ratio", "decay_ratio")
_ADAMW = {
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
}  # not read of an optimiser of one's own


def absent(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for Hydra, which takes no GROUP=null, and the groups that are to have no option."""
    gone = [group for group in _MAY_BE_ABSENT if f"{group}=null" in words]
    return [word for word in words if word.removesuffix("=null") not in gone], gone


def plugged(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words for Hydra, and those of each part of one's own by the key that it replaces.

    Your own reward replaces the recipe's; reward=OPTION beside it keeps that one as well.
    """
    targets = [word.partition("=")[0] for word in words]
    keys = dict.fromkeys(t.removesuffix("._target_") for t in targets if t.endswith("._target_"))  # in their order
    outer = [key for key in keys if not any(key.startswith(f"{other}.") for other in keys)]
    found = {key: [word for word in words if word.startswith(f"{key}.")] for key in outer}
    rest = [word for word in words if not any(word in own for own in found.values())]
    if any(key.startswith("reward.") for key in outer) and not any(word.startswith("reward=") for word in words):
        rest.append("reward=[]")
    return rest, found


def put_in(tree: DictConfig, plugs: dict[str, list[str]], choices: dict[str, str], words: Sequence[str]) -> None:
    """Replace each part in the composed tree: the option's keys go, but for groups below it that the other words name.

    Raises ConfigError for a key that is no part.
    """
    for key, typed in plugs.items():
        _check_part(tree, key)
        group = key.replace(".", "/")
        below = [choice for choice in choices if choice.startswith(f"{group}/")]
        named = [choice for choice in below if any(word.startswith(f"{choice}=") for word in words)]
        own = _kept(tree, key, [choice.removeprefix(f"{group}/") for choice in named])
        for word in typed:
            name = word.partition("=")[0].removeprefix(f"{key}.")
            OmegaConf.update(own, name, value_of(word), force_add=True)
        for choice in set(below) - set(named):
            choices.pop(choice)
        if group in groups():
            choices[group] = str(own["_target_"])
        OmegaConf.update(tree, key, own, merge=False, force_add=True)


def _kept(tree: DictConfig, key: str, groups_below: Sequence[str]) -> DictConfig:
    """What of a replaced option stays."""
    old = OmegaConf.select(tree, key) or {}
    names = [*groups_below, "_partial_", *(_SCHEDULE if key == "optimizer" else ())]
    return OmegaConf.create({name: old[name] for name in names if name in old})


def _check_part(tree: DictConfig, key: str) -> None:
    if key == "reward":
        raise ConfigError("reward._target_ is not a setting; a component has a name: reward.NAME._target_=...")
    if key in _NO_CLASS:
        raise ConfigError(f"{key}._target_ is not a setting; {key} takes no class, only options: {key}=NAME")
    section, _, name = key.partition(".")
    if (section in ("reward", "callbacks") and name and "." not in name) or key.replace(".", "/") in groups():
        return
    node = OmegaConf.select(tree, key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        known = {name.replace("/", ".") for name in groups()} - {*_NO_CLASS, "reward"}
        raise ConfigError(f"{key}._target_ is not a setting{nearest(key, known)}")


def own_optimizer(values: Json) -> Json:
    """The fields of OwnOptimizerConfig, of the section `optimizer` with a _target_."""
    keys = {key: value for key, value in values.items() if key not in ("_target_", *_SCHEDULE)}
    ours = {key: values[key] for key in _SCHEDULE if key in values}
    return ours | _ADAMW | {"target": values["_target_"], "keys": keys}
