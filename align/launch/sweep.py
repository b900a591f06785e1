"""Words with several values, `optimizer.lr=1e-6,1e-7`, to one run for each combination."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config import Config, ConfigError, alternatives, compose, quoted


@dataclass(frozen=True)
class Element:
    """One run of a sweep."""

    name: str
    words: tuple[str, ...]  # with a run.dir of its own
    config: Config  # of these words, but for run.dir


def elements(words: Sequence[str], config_dir: Path | None) -> list[Element]:
    """The runs of a sweep, in the order in which the last word changes first; run.dir is their common directory.

    The same words name the same directories: a sweep resumes, and can be added to. Raises ConfigError for settings
    that are wrong in any of them, before anything starts, and if nothing is swept.
    """
    choices = [alternatives(word, config_dir) for word in words]
    swept = [i for i, found in enumerate(choices) if len(found) > 1]
    if not swept:
        raise ConfigError("-m is for several values, as in optimizer.lr=1e-6,1e-7; here each key has one")
    out = []
    for combination in itertools.product(*choices):
        config = compose(combination, config_dir)
        name = "_".join(_part(combination[i]) for i in swept)
        own = combination
        if not any(combination[i].startswith("run.dir=") for i in swept):
            recipe = config.choices.get("recipe", config.choices["objective"]).replace("/", "-")
            base = Path(config.run.dir or Path("runs") / f"{recipe}-{config.choices['model']}-sweep")
            own = (*(w for w in own if not w.startswith("run.dir=")), f"run.dir={quoted(str(base / name))}")
        out.append(Element(name, own, config))
    names = [element.name for element in out]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two runs of the sweep would both be called {twice}; give run.dir=A,B,... of their own")
    return out


def _part(word: str) -> str:
    """A setting as a piece of a directory's name: lr-1e-06 of optimizer.lr=1e-06."""
    key, _, value = word.partition("=")
    sign = "-" if re.match(r"-[\d.]", value) else ""
    return f"{key.rpartition('.')[2]}-{sign}{re.sub(r'[^A-Za-z0-9.+-]+', '-', value).strip('-')}"[:80]
