"""What the chosen options of the shipped groups hold, without a recipe and the command line's words.

Hydra composes it too, for a directory of one's own as well: a second composition, which costs each command what the
first one does. Of what Hydra's lists of defaults can say, our files say three things: another option of the same group,
an option of a group below, and an option put somewhere else; the last two stand among the choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import yaml
from omegaconf import DictConfig, OmegaConf

from align.jsons import Json
from align.vocabulary import shipped_root

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def shipped(choices: Mapping[str, str]) -> DictConfig:
    """Of these options, by group or group@place, and of the settings in no group; their keys are what there is to set,
    their values may be overridden by another of these options."""
    out = OmegaConf.create({key: value for key, value in _read("config").items() if key != "defaults"})
    for where, option in choices.items():
        group, _, place = where.partition("@")
        for node in _with_defaults(group, option):
            OmegaConf.update(out, place or group.replace("/", "."), node, force_add=True)
    return out


def _with_defaults(group: str, option: str) -> list[Json]:
    """The option's own settings after those of the options of its group that it begins with."""
    node = dict(_read(f"{group}/{option}"))
    named = [name for name in node.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    return [*(part for name in named for part in _with_defaults(group, name)), node]


@cache
def _read(name: str) -> Json:
    with open(shipped_root() / "configs" / f"{name}.yaml", encoding="utf-8") as file:
        return yaml.load(file, _Loader)
